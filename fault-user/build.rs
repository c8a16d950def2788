//! Lists the folders in which a file more is a fault more, so that a new fault has to be registered nowhere.
//!
//! For each it writes a macro that hands the list to another one: `name Type "name",` of every file, where
//! `slow_close.rs` holds `SlowClose`.

use std::path::Path;
use std::{env, fs, io};

/// Files of the folders that are no faults of their own: what all have in common, and `mix`, which is made of others.
const NO_FAULTS: [&str; 3] = ["mod", "mix", "packet"];

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    list("src/rule/faults", "each_fault", "faults.rs")?;
    list("src/relay/stage", "each_stage", "stages.rs")
}

/// Writes the macro `name` for the files of a folder.
fn list(folder: &str, name: &str, output: &str) -> io::Result<()> {
    println!("cargo:rerun-if-changed={folder}");
    let mut modules = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let module = path.file_stem().and_then(|stem| stem.to_str());
        if let Some(module) = module.filter(|module| !NO_FAULTS.contains(module)) {
            modules.push(module.to_owned());
        }
    }
    modules.sort();
    let entries: Vec<_> = modules
        .iter()
        .map(|module| {
            let cfg = if module == "example" {
                "#[cfg(test)] "
            } else {
                ""
            };
            format!("    {cfg}{module} {} \"{module}\",\n", type_name(module))
        })
        .collect();
    let entries = entries.concat();
    let text = format!("macro_rules! {name} {{ ($to:ident) => {{ $to! {{\n{entries}}} }} }}\n");
    let folder = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("cargo sets OUT_DIR"))?;
    fs::write(Path::new(&folder).join(output), text)
}

/// `SlowClose` for `slow_close`.
fn type_name(module: &str) -> String {
    let capital = |word: &str| {
        let (first, rest) = word.split_at(1);
        first.to_ascii_uppercase() + rest
    };
    module.split('_').map(capital).collect()
}
