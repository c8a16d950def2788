//! `cargo xtask build-ebpf`: makes the object that `fault` embeds, or checks the committed one.
//!
//! The object is committed so that users need nothing but stable Rust. Beside it lies a record of
//! what it came from, so that a stale object can't go unnoticed.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use object::build::elf::{Builder, SectionData};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::stack;
use crate::workspace::{cargo, cargo_home, find_program, output, root, run as run_command, tool};

/// Little-endian BPF: one object serves every little-endian CPU.
const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "fault-user/ebpf/fault.bpf.o";
const RECORD: &str = "fault-user/ebpf/fault.bpf.json";

/// What every build passes to rustc, whichever route it takes.
///
/// Debug info is only there for BTF to be made from it and is stripped afterwards. The `cfg` is
/// what aya-ebpf asks for; it chooses the layout of registers in kprobes, which fault has none of.
const RUSTC_FLAGS: &[&str] = &[
    "-Cpanic=abort",
    // 32-bit registers (Linux 5.1): without them the code is a third longer and the verifier loses
    // track of bounds.
    "-Ctarget-cpu=v3",
    "-Cdebuginfo=2",
    "-Ccodegen-units=1",
    "-Clink-arg=--btf",
    // Otherwise LLVM makes a call of every memset, which goes byte by byte, and which the verifier follows byte by
    // byte.
    "-Clink-arg=--disable-expand-memcpy-in-order",
    "--cfg=bpf_target_arch=\"x86_64\"",
];

/// Build the eBPF object from source, or check that the committed one is current.
#[derive(clap::Args)]
pub struct Arguments {
    /// Change nothing; fail when the committed object is not what the sources make
    #[arg(long)]
    check: bool,
    /// Take this compiler even when another would be chosen
    #[arg(long)]
    route: Option<Route>,
}

/// Which compiler makes the object.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Route {
    /// Debian's rustc-web, which brings a prebuilt `core` for BPF
    Debian,
    /// rustup's toolchain, which builds `core` from the component rust-src
    Rustup,
}

/// A compiler that can make the object, and all that its output depends on.
struct Toolchain {
    route: Route,
    cargo: PathBuf,
    rustc: PathBuf,
    /// What `rustc --version` prints.
    compiler: String,
    /// The linker's version and that of the LLVM it loads.
    linker: String,
    /// Where the linker finds its LLVM.
    llvm_folder: PathBuf,
}

/// What the committed object came from.
#[derive(Serialize, Deserialize, PartialEq, Eq)]
struct Record {
    sources_sha256: String,
    object_sha256: String,
    compiler: String,
    linker: String,
}

/// Runs the subcommand.
///
/// # Errors
/// Fails when there is no toolchain, when the sources don't build, or when a check finds the
/// committed object out of date.
pub fn run(arguments: &Arguments) -> Result<()> {
    if arguments.check {
        check(arguments.route)
    } else {
        build(arguments.route)
    }
}

fn build(route: Option<Route>) -> Result<()> {
    let toolchain = Toolchain::find(route)?;
    println!("building the eBPF object with {}", toolchain.describe());
    let object = toolchain.build()?;
    let record = Record {
        sources_sha256: sources_sha256()?,
        object_sha256: sha256(&object),
        compiler: toolchain.compiler,
        linker: toolchain.linker,
    };
    let path = root().join(OBJECT);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("can't create {}", folder.display()))?;
    }
    fs::write(&path, &object).with_context(|| format!("can't write {OBJECT}"))?;
    let text = serde_json::to_string_pretty(&record)? + "\n";
    fs::write(root().join(RECORD), text).with_context(|| format!("can't write {RECORD}"))?;
    println!(
        "{OBJECT}: {} bytes, sha256 {}",
        object.len(),
        record.object_sha256
    );
    Ok(())
}

/// Fails unless the committed object is what the sources make.
///
/// The bytes are compared where the compiler and the linker that made it are here; the digest of
/// the sources always is.
///
/// # Errors
/// One line that says what is out of date.
pub fn check(route: Option<Route>) -> Result<()> {
    const MEND: &str = "run `cargo xtask build-ebpf` and commit what it wrote";
    let text = fs::read_to_string(root().join(RECORD))
        .with_context(|| format!("can't read {RECORD}: {MEND}"))?;
    let record: Record = serde_json::from_str(&text)
        .with_context(|| format!("{RECORD} is not a record of ours: {MEND}"))?;
    let committed =
        fs::read(root().join(OBJECT)).with_context(|| format!("can't read {OBJECT}: {MEND}"))?;
    if sha256(&committed) != record.object_sha256 {
        bail!("{OBJECT} is not the object that {RECORD} describes: {MEND}");
    }
    if sources_sha256()? != record.sources_sha256 {
        bail!("{OBJECT} is older than its sources: {MEND}");
    }
    stack::check(&committed)?;
    let toolchain = match Toolchain::find_all(route) {
        Ok(found) => found.into_iter().find(|toolchain| toolchain.made(&record)),
        Err(error) => {
            println!("{OBJECT} matches its sources; not built again: {error:#}");
            return Ok(());
        }
    };
    let Some(toolchain) = toolchain else {
        println!(
            "{OBJECT} matches its sources; not built again, since it came from {} and {}, which \
             are not here",
            record.compiler, record.linker
        );
        return Ok(());
    };
    if toolchain.build()? != committed {
        bail!(
            "{OBJECT} is not what its sources make with {}: {MEND}",
            toolchain.describe()
        );
    }
    println!(
        "{OBJECT} is what its sources make with {}",
        toolchain.describe()
    );
    Ok(())
}

/// Lints the eBPF crate for its own target, where a toolchain with clippy is there.
///
/// # Errors
/// Fails on any warning.
pub fn clippy() -> Result<()> {
    let toolchain = match Toolchain::find(None) {
        Ok(toolchain) => toolchain,
        Err(error) => {
            println!("fault-ebpf is not linted: {error:#}");
            return Ok(());
        }
    };
    // Not through cargo, which would look for the subcommand in rustup's folder first.
    let clippy = toolchain.cargo.with_file_name("cargo-clippy");
    if !clippy.is_file() {
        println!(
            "fault-ebpf is not linted: no {}; {}",
            clippy.display(),
            instructions()
        );
        return Ok(());
    }
    let mut command = toolchain.command(&clippy, "clippy")?;
    command
        .env("CARGO", &toolchain.cargo)
        .args(["--", "--deny=warnings"]);
    run_command(&mut command)
}

impl Toolchain {
    /// The toolchain to use: Debian's where both are there, since that is what CI has.
    ///
    /// # Errors
    /// Says what to install where there is none.
    fn find(route: Option<Route>) -> Result<Self> {
        let mut found = Self::find_all(route)?;
        Ok(found.swap_remove(0))
    }

    /// All toolchains of this machine, at least one, the preferred first.
    fn find_all(route: Option<Route>) -> Result<Vec<Self>> {
        let linker = tool("bpf-linker");
        let linker_version = output(Command::new(&linker).arg("--version"))
            .with_context(|| format!("no bpf-linker: {}", instructions()))?;
        // The linker loads the LLVM of the rustc that the user works with.
        let host_rustc = find_program("rustc").context("no rustc in PATH")?;
        let llvm = llvm_version(&host_rustc)?;
        let llvm_folder = sysroot(&host_rustc)?.join("lib");
        let mut found = Vec::new();
        for (kind, rustc, cargo) in [
            (
                Route::Debian,
                "/usr/bin/rustc".into(),
                "/usr/bin/cargo".into(),
            ),
            (
                Route::Rustup,
                host_rustc,
                find_program("cargo").context("no cargo in PATH")?,
            ),
        ] {
            if route.is_none_or(|wanted| wanted == kind) && kind.is_complete(&rustc)? {
                found.push(Self {
                    route: kind,
                    cargo,
                    compiler: output(toolchain_command(&rustc).arg("--version"))?,
                    rustc,
                    linker: format!("{linker_version}, LLVM {llvm}"),
                    llvm_folder: llvm_folder.clone(),
                });
            }
        }
        if found.is_empty() {
            bail!("no compiler for {TARGET}: {}", instructions());
        }
        Ok(found)
    }

    fn describe(&self) -> String {
        let route = match self.route {
            Route::Debian => "Debian's prebuilt core",
            Route::Rustup => "rustup's rust-src",
        };
        format!("{} ({route}) and {}", self.compiler, self.linker)
    }

    fn made(&self, record: &Record) -> bool {
        self.compiler == record.compiler && self.linker == record.linker
    }

    /// Cargo, or a part of it, with all that building the eBPF crate takes.
    fn command(&self, program: &Path, subcommand: &str) -> Result<Command> {
        let mut flags: Vec<String> = RUSTC_FLAGS.iter().map(|&flag| flag.to_owned()).collect();
        flags.push(format!("-Clinker={}", tool("bpf-linker").display()));
        // Paths go into BTF and panic messages: the same sources must make the same bytes anywhere.
        flags.push(format!("--remap-path-prefix={}=.", root().display()));
        flags.push(format!(
            "--remap-path-prefix={}=cargo",
            cargo_home()?.display()
        ));
        let rust_source = sysroot(&self.rustc)?.join("lib/rustlib/src/rust");
        flags.push(format!(
            "--remap-path-prefix={}=rust",
            rust_source.display()
        ));

        let mut command = toolchain_command(program);
        command
            .current_dir(root())
            .arg(subcommand)
            .args([
                "--locked",
                "--release",
                "--package=fault-ebpf",
                "--target",
                TARGET,
            ])
            .arg("--target-dir")
            .arg(root().join("target/ebpf"))
            .env("RUSTC", &self.rustc)
            // `core` for BPF is not a stable target, and aya-ebpf uses unstable features of it.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
            .env("CARGO_PROFILE_RELEASE_STRIP", "none")
            .env("LD_LIBRARY_PATH", &self.llvm_folder);
        if self.route == Route::Rustup {
            command.arg("-Zbuild-std=core");
        }
        Ok(command)
    }

    fn build(&self) -> Result<Vec<u8>> {
        run_command(self.command(&self.cargo, "build")?.arg("--quiet"))?;
        let built = root()
            .join("target/ebpf")
            .join(TARGET)
            .join("release/fault-ebpf");
        let bytes = fs::read(&built).with_context(|| format!("can't read {}", built.display()))?;
        stripped(&bytes).with_context(|| format!("can't strip {}", built.display()))
    }
}

impl Route {
    /// Whether this compiler is there with a `core` for BPF, prebuilt or as source.
    fn is_complete(self, rustc: &Path) -> Result<bool> {
        if !rustc.is_file() {
            return Ok(false);
        }
        let rustlib = sysroot(rustc)?.join("lib/rustlib");
        Ok(match self {
            Self::Debian => rustlib.join(TARGET).is_dir(),
            Self::Rustup => rustlib.join("src/rust/library/core").is_dir(),
        })
    }
}

/// What to type where the eBPF toolchain is missing.
fn instructions() -> &'static str {
    "run `cargo xtask setup --for build`, which installs it on Debian and says what to type elsewhere"
}

/// A command that does not inherit what rustup and cargo told this process about themselves.
fn toolchain_command(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let is_of_caller = text.starts_with("CARGO_") && text != "CARGO_HOME";
        if is_of_caller || text.starts_with("RUSTC") || text == "CARGO" || text == "RUSTFLAGS" {
            command.env_remove(&name);
        }
    }
    command
}

fn sysroot(rustc: &Path) -> Result<PathBuf> {
    Ok(output(toolchain_command(rustc).args(["--print", "sysroot"]))?.into())
}

fn llvm_version(rustc: &Path) -> Result<String> {
    let text = output(toolchain_command(rustc).arg("-vV"))?;
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "));
    Ok(version
        .with_context(|| format!("{} names no LLVM version", rustc.display()))?
        .to_owned())
}

/// Removes what no loader reads, which is DWARF and the relocations of BTF that only a linker needs,
/// and gives symbols the names that people know.
fn stripped(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object)?;
    for section in &mut builder.sections {
        let name = section.name.to_string();
        section.delete = name.starts_with(".debug_")
            || name.starts_with(".rel.debug_")
            || name.starts_with(".rel.BTF");
        if let (".BTF.ext", SectionData::Data(data)) = (name.as_str(), &section.data) {
            section.data = SectionData::Data(without_lines(data)?.into());
        }
    }
    builder.delete_orphans();
    // A mangled name holds a hash over all that cargo built before, build scripts of dependencies
    // included, which says nothing about the code.
    for symbol in &mut builder.symbols {
        let name = symbol.name.to_string();
        symbol.name = format!("{:#}", rustc_demangle::demangle(&name))
            .into_bytes()
            .into();
    }
    // LLVM keeps the names of sections among those of symbols; the writer wants a table for them.
    let names = builder.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.data = SectionData::SectionString;
    names.sh_addralign = 1;
    let mut bytes = Vec::new();
    builder.write(&mut bytes)?;
    Ok(bytes)
}

/// `.BTF.ext` without the line numbers of instructions, of which aya copies all for each function when it loads the object.
///
/// The header is `struct btf_ext_header` in the kernel's `tools/lib/bpf/libbpf_internal.h`.
fn without_lines(data: &[u8]) -> Result<Vec<u8>> {
    const HEADER_SIZE: usize = 4;
    /// With the offset of the records of CO-RE, which the oldest kernels' headers lack.
    const HEADER_BYTES: usize = 32;
    const OFFSETS: [usize; 3] = [8, 16, 24];
    const LINES: usize = 16;
    let word = |at: usize| -> Result<usize> {
        let bytes = data.get(at..at + 4).context("a .BTF.ext that is cut off")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    let header = word(HEADER_SIZE)?;
    if header < HEADER_BYTES {
        bail!("a .BTF.ext with a header of {header} bytes: expected at least {HEADER_BYTES}");
    }
    let (first, count) = (word(LINES)?, word(LINES + 4)?);
    let begin = header + first;
    let mut rest = data.to_vec();
    if begin + count > rest.len() {
        bail!("a .BTF.ext whose lines are cut off");
    }
    rest.drain(begin..begin + count);
    rest[LINES + 4..LINES + 8].fill(0);
    for at in OFFSETS {
        let offset = word(at)?;
        if offset > first {
            let moved = u32::try_from(offset - count)?;
            rest[at..at + 4].copy_from_slice(&moved.to_le_bytes());
        }
    }
    Ok(rest)
}

/// A digest over all that decides what the object does: sources, dependencies, flags.
fn sources_sha256() -> Result<String> {
    let mut hash = Sha256::new();
    let mut add = |name: &str, content: &[u8]| {
        hash.update(format!("{name}\n{}\n", content.len()));
        hash.update(content);
    };
    let mut files = BTreeSet::new();
    for folder in ["fault-ebpf", "fault-common/src"] {
        collect_files(&root().join(folder), &mut files)?;
    }
    files.insert(root().join("fault-common/Cargo.toml"));
    for file in &files {
        let name = file.strip_prefix(root())?.to_string_lossy();
        add(
            &name,
            &fs::read(file).with_context(|| format!("can't read {}", file.display()))?,
        );
    }
    add("dependencies", dependencies()?.as_bytes());
    add("flags", RUSTC_FLAGS.join("\n").as_bytes());
    Ok(hex::encode(hash.finalize()))
}

/// The crates that go into the object, with version and features, as Cargo.lock has them.
fn dependencies() -> Result<String> {
    let tree = output(cargo().args([
        "tree",
        "--locked",
        "--quiet",
        "--package=fault-ebpf",
        "--edges=normal",
        "--target",
        TARGET,
        "--prefix=none",
        "--no-dedupe",
        "--format={p}|{f}",
    ]))?;
    // A crate of ours is named with its folder, which differs from one checkout to the next.
    let here = format!(" ({}", root().display());
    let crates: BTreeSet<_> = tree
        .lines()
        .map(|line| match line.split_once(&here) {
            Some((name, rest)) => format!("{name} {rest}"),
            None => line.to_owned(),
        })
        .collect();
    Ok(crates.into_iter().collect::<Vec<_>>().join("\n"))
}

fn collect_files(folder: &Path, files: &mut BTreeSet<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("can't read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            collect_files(&path, files)?;
        } else {
            files.insert(path);
        }
    }
    Ok(())
}

/// The SHA-256 of these bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::without_lines;

    /// A header of so many bytes, then functions `f`, lines `l` and CO-RE records `c`, four bytes each.
    fn section(header: u32) -> Vec<u8> {
        let words = [0x0001_eb9f, header, 0, 4, 4, 4, 8, 4];
        let mut bytes: Vec<u8> = words
            .iter()
            .flat_map(|word: &u32| word.to_le_bytes())
            .collect();
        bytes.truncate(header as usize);
        bytes.extend(b"ffffllllcccc");
        bytes
    }

    #[test]
    fn lines_go_and_what_is_behind_them_moves() {
        let rest = without_lines(&section(32)).unwrap();
        assert_eq!(&rest[32..], b"ffffcccc");
        let words: Vec<_> = rest[8..32].chunks(4).map(|word| word[0]).collect();
        assert_eq!(words, [0, 4, 4, 0, 4, 4]);
    }

    #[test]
    fn a_header_without_the_records_of_core_is_an_error() {
        let error = without_lines(&section(24)).unwrap_err().to_string();
        assert!(error.contains("header of 24 bytes"), "{error}");
        assert!(
            without_lines(&section(32)[..36]).is_err(),
            "lines that are cut off"
        );
    }
}
