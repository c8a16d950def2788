//! The order of `fault-user`'s modules: ARCHITECTURE.md says what each may import from, and this reads the imports.
//!
//! A folder of `fault-user/src` may import only from those that its row of the table names; no modules import from each
//! other in a circle, except parent and child.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use syn::{UseTree, visit::Visit};

use crate::workspace::root;

/// What stands before and after the table.
const MARKS: [&str; 2] = ["<!-- layers -->", "<!-- /layers -->"];

/// Checks the imports against the table.
///
/// # Errors
/// An import that the table does not allow, a circle, or a table that does not fit the folders.
pub fn check() -> Result<()> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md"))?;
    let allowed = table(&text)?;
    let modules = modules(&root().join("fault-user/src"))?;
    let mut complaints = against(&allowed, &modules);
    complaints.extend(circles(&modules));
    if !complaints.is_empty() {
        bail!("imports:\n{}", complaints.join("\n"));
    }
    Ok(())
}

/// A module's path, such as `["sys", "net"]`.
pub type Module = Vec<String>;

/// Each module with those that it imports from.
type Imports = BTreeMap<Module, BTreeSet<Module>>;

/// The rows of the table: a folder, and what it may import from.
fn table(text: &str) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let [begin, end] = MARKS;
    let rest = text.split_once(begin).context("no table of layers")?.1;
    let rows = rest
        .split_once(end)
        .context("the table of layers has no end")?
        .0;
    let words = |cell: &str| -> BTreeSet<String> {
        let quoted = cell.split('`').skip(1).step_by(2);
        quoted.map(str::to_owned).collect()
    };
    let mut allowed = BTreeMap::new();
    for row in rows.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let [_, name, _, imports, _] = cells[..] else {
            bail!("a row of the table of layers has other columns: {row}");
        };
        allowed.extend(words(name).into_iter().map(|name| (name, words(imports))));
    }
    Ok(allowed)
}

/// Reads all modules below a folder, without their tests.
fn modules(folder: &Path) -> Result<Imports> {
    let files = sources(folder)?;
    let known: BTreeSet<Module> = files.iter().map(|(module, _)| module.clone()).collect();
    let mut imports = Imports::new();
    for (module, text) in files {
        let file = syn::parse_file(&text)
            .with_context(|| format!("{} can't be read", module.join("::")))?;
        let mut reader = Reader {
            module: &module,
            known: &known,
            found: BTreeSet::new(),
        };
        reader.visit_file(&file);
        let found = reader.found;
        imports.insert(module, found);
    }
    Ok(imports)
}

/// Every module below a folder with its text, without `main.rs` and `lib.rs`.
pub fn sources(folder: &Path) -> Result<Vec<(Module, String)>> {
    let mut files = Vec::new();
    collect(folder, &mut Vec::new(), &mut files)?;
    Ok(files)
}

fn collect(folder: &Path, at: &mut Module, files: &mut Vec<(Module, String)>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let Some(name) = path.file_stem().and_then(|name| name.to_str()) else {
            continue;
        };
        at.push(name.to_owned());
        if path.is_dir() {
            collect(&path, at, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let is_root = at.len() == 1 && (name == "lib" || name == "main");
            let depth = at.len() - usize::from(name == "mod");
            if !is_root {
                files.push((at[..depth].to_vec(), fs::read_to_string(&path)?));
            }
        }
        at.pop();
    }
    Ok(())
}

/// Finds the modules that a file names, in `use` and elsewhere.
struct Reader<'a> {
    module: &'a Module,
    known: &'a BTreeSet<Module>,
    found: BTreeSet<Module>,
}

impl Reader<'_> {
    /// Takes a path that begins with `crate`, `self` or `super`.
    fn take(&mut self, path: &[String]) {
        let mut full = match path.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("self" | "super") => self.module.clone(),
            _ => return,
        };
        for word in path {
            match word.as_str() {
                "crate" | "self" => {}
                "super" => drop(full.pop()),
                word => full.push(word.to_owned()),
            }
        }
        while !full.is_empty() && !self.known.contains(&full) {
            full.pop();
        }
        if !full.is_empty() && full != *self.module {
            self.found.insert(full);
        }
    }

    fn take_tree(&mut self, before: &mut Vec<String>, tree: &UseTree) {
        match tree {
            UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.take_tree(before, &path.tree);
                before.pop();
            }
            UseTree::Name(name) => self.take_leaf(before, name.ident.to_string()),
            UseTree::Rename(name) => self.take_leaf(before, name.ident.to_string()),
            UseTree::Glob(_) => self.take(before),
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.take_tree(before, tree);
                }
            }
        }
    }

    fn take_leaf(&mut self, before: &mut Vec<String>, name: String) {
        before.push(name);
        self.take(before);
        before.pop();
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.take_tree(&mut Vec::new(), &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let words: Vec<_> = path
            .segments
            .iter()
            .map(|one| one.ident.to_string())
            .collect();
        self.take(&words);
        syn::visit::visit_path(self, path);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        // Tests may look at everything; the child modules of a file are read by themselves.
        if !is_test(item) {
            syn::visit::visit_item_mod(self, item);
        }
    }
}

/// Whether a module is built for tests only.
pub fn is_test(item: &syn::ItemMod) -> bool {
    item.attrs.iter().any(|one| one.path().is_ident("cfg"))
}

/// Imports that the table does not allow, and folders that it does not know.
fn against(allowed: &BTreeMap<String, BTreeSet<String>>, imports: &Imports) -> Vec<String> {
    let mut complaints = Vec::new();
    for (module, others) in imports {
        let Some(may) = allowed.get(&module[0]) else {
            complaints.push(format!("ARCHITECTURE.md has no row for `{}`", module[0]));
            continue;
        };
        for other in others {
            if other[0] != module[0] && !may.contains(&other[0]) {
                complaints.push(format!(
                    "{} imports {}, which its row in ARCHITECTURE.md does not allow",
                    module.join("::"),
                    other.join("::")
                ));
            }
        }
    }
    complaints
}

/// Modules that import from each other in a circle; parent and child may.
fn circles(imports: &Imports) -> Vec<String> {
    let is_kin = |a: &Module, b: &Module| a.starts_with(b) || b.starts_with(a);
    let reached = |from: &Module| {
        let mut seen = BTreeSet::new();
        let mut next = vec![from.clone()];
        while let Some(module) = next.pop() {
            for other in imports.get(&module).into_iter().flatten() {
                if !is_kin(&module, other) && seen.insert(other.clone()) {
                    next.push(other.clone());
                }
            }
        }
        seen
    };
    let in_circles: BTreeSet<_> = imports
        .keys()
        .filter(|module| reached(module).contains(*module))
        .collect();
    in_circles
        .iter()
        .map(|module| {
            let others: Vec<_> = reached(module)
                .into_iter()
                .filter(|other| in_circles.contains(other))
                .map(|other| other.join("::"))
                .collect();
            format!(
                "{} is in a circle of imports: {}",
                module.join("::"),
                others.join(", ")
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str) -> Module {
        path.split("::").map(str::to_owned).collect()
    }

    fn imports_of(texts: &[(&str, &str)]) -> Imports {
        let known: BTreeSet<_> = texts.iter().map(|(path, _)| module(path)).collect();
        let read = |(path, text): &(&str, &str)| {
            let module = module(path);
            let mut reader = Reader {
                module: &module,
                known: &known,
                found: BTreeSet::new(),
            };
            reader.visit_file(&syn::parse_file(text).unwrap());
            let found = reader.found;
            (module, found)
        };
        texts.iter().map(read).collect()
    }

    #[test]
    fn an_arrow_against_the_order_is_found() {
        let text =
            "<!-- layers -->\n| `low` | x | nothing |\n| `high` | x | `low` |\n<!-- /layers -->";
        let allowed = table(text).unwrap();
        let right = imports_of(&[("low", ""), ("high", "use crate::low::Thing;")]);
        assert_eq!(against(&allowed, &right), [""; 0]);
        for wrong in [
            "use crate::high::Thing;",
            "fn f() { crate::high::f(); }",
            "use super::{high::A};",
        ] {
            let wrong = imports_of(&[("low", wrong), ("high", "")]);
            assert_eq!(against(&allowed, &wrong).len(), 1);
        }
        let tested = imports_of(&[
            ("low", "#[cfg(test)] mod tests { use crate::high; }"),
            ("high", ""),
        ]);
        assert_eq!(against(&allowed, &tested), [""; 0]);
        assert_eq!(against(&allowed, &imports_of(&[("new", "")])).len(), 1);
    }

    #[test]
    fn a_circle_is_found_and_parent_and_child_are_none() {
        let kin = imports_of(&[("a", "use self::b::B;"), ("a::b", "use super::A;")]);
        assert_eq!(circles(&kin), [""; 0]);
        let circle = imports_of(&[
            ("a::b", "use super::c::C;"),
            ("a::c", "use crate::a::d::D;"),
            ("a::d", "use super::b::B;"),
        ]);
        assert_eq!(circles(&circle).len(), 3);
    }
}
