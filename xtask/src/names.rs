//! Names of types: two that more than one file can see never share one.
//!
//! Types of a fault that a macro makes are not seen here: `rule/faults/NAME.rs` and `relay/stage/NAME.rs` are both
//! named after it.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use syn::{Item, Visibility};

use crate::{layers, workspace::root};

/// The crates of the product.
const CRATES: [&str; 3] = ["fault-common", "fault-ebpf", "fault-user"];

/// Reads the sources of all crates.
///
/// # Errors
/// A name that two types have, or a file that can't be read.
pub fn check() -> Result<()> {
    let mut owners: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for name in CRATES {
        for (module, text) in layers::sources(&root().join(name).join("src"))? {
            let module = format!("{name}/{}", module.join("/"));
            let file = syn::parse_file(&text).with_context(|| format!("reading {module}"))?;
            for name in visible_types(&file.items) {
                owners.entry(name).or_default().push(module.clone());
            }
        }
    }
    let shared: Vec<_> = owners
        .iter()
        .filter(|(_, owners)| owners.len() > 1)
        .map(|(name, owners)| format!("{name}: {}", owners.join(", ")))
        .collect();
    if !shared.is_empty() {
        bail!("types that share a name:\n{}", shared.join("\n"));
    }
    Ok(())
}

/// The types that other files can see, without those of tests.
fn visible_types(items: &[Item]) -> Vec<String> {
    let mut names = Vec::new();
    for item in items {
        let (visibility, name) = match item {
            Item::Struct(item) => (&item.vis, &item.ident),
            Item::Enum(item) => (&item.vis, &item.ident),
            Item::Union(item) => (&item.vis, &item.ident),
            Item::Trait(item) => (&item.vis, &item.ident),
            Item::Type(item) => (&item.vis, &item.ident),
            Item::Mod(item) if !layers::is_test(item) => {
                let inside = item.content.as_ref().map(|(_, items)| visible_types(items));
                names.extend(inside.into_iter().flatten());
                continue;
            }
            _ => continue,
        };
        if !matches!(visibility, Visibility::Inherited) {
            names.push(name.to_string());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_types_and_those_of_tests_are_left_out() {
        let text = "pub struct A; struct B; pub(crate) enum C {} mod inside { pub type D = u8; }
            #[cfg(test)] mod tests { pub struct E; }";
        let items = syn::parse_file(text).unwrap().items;
        assert_eq!(visible_types(&items), ["A", "C", "D"]);
    }
}
