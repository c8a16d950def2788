//! The root file system of a virtual machine: test programs, a shell, a few tools, modules.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufWriter, Write as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{Programs, kernel::Kernel};
use crate::{
    skip::SHOW_OUTPUT,
    workspace::{find_program, shown},
};

/// What init and the tests call, each from this machine with the libraries it needs. The shell is not
/// busybox, whose own `ip` and `tc` come before what is in PATH.
const TOOLS: &[&str] = &["sh", "bash", "busybox", "ip", "tc", "ss", "bpftool", "ping"];

/// Small files that programs expect to find: path and content.
const FILES: &[(&str, &str)] = &[
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\ntester:x:1000:1000:tester:/tmp:/bin/sh\n\
         nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    ),
    ("etc/group", "root:x:0:\ntester:x:1000:\nnogroup:x:65534:\n"),
    (
        "etc/hosts",
        "127.0.0.1 localhost\n::1 localhost ip6-localhost\n",
    ),
    (
        "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files\n",
    ),
];

/// Writes the archive that a kernel unpacks and starts `/init` of.
///
/// # Errors
/// Fails when a tool is missing or the archive can't be written.
pub fn pack(
    archive: &Path,
    kernel: &Kernel,
    programs: &Programs,
    arguments: &[String],
) -> Result<()> {
    if let Some(folder) = archive.parent() {
        fs::create_dir_all(folder)?;
    }
    let file =
        fs::File::create(archive).with_context(|| format!("can't write {}", archive.display()))?;
    let mut root = Archive {
        output: BufWriter::new(file),
        folders: BTreeSet::new(),
        inode: 0,
    };
    root.file("init", 0o755, include_bytes!("init.sh"))?;
    for (path, content) in FILES {
        root.file(path, 0o644, content.as_bytes())?;
    }
    for folder in ["sbin", "usr/bin", "usr/sbin"] {
        root.link(folder, "/bin")?;
    }
    add_tools(&mut root)?;
    for (number, module) in kernel.modules()?.iter().enumerate() {
        let name = module
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let name = name.context("a module without a name")?;
        let name = name.split('.').next().unwrap_or(&name);
        root.file(
            &format!("modules/{number:03}-{name}.ko"),
            0o644,
            &read_module(module)?,
        )?;
    }
    // Tests know the program by the path at which cargo built it.
    let fault = &programs.fault.path;
    root.copy(fault, fault)?;
    root.link("bin/fault", &fault.to_string_lossy())?;
    for suite in &programs.suites {
        root.copy(&suite.path, &Path::new("tests").join(&suite.name))?;
    }
    let names: Vec<_> = programs
        .suites
        .iter()
        .map(|suite| suite.name.as_str())
        .collect();
    root.file("tests/list", 0o644, lines(&names).as_bytes())?;
    let arguments = [arguments, &[SHOW_OUTPUT.to_owned()]].concat();
    root.file("tests/arguments", 0o644, lines(&arguments).as_bytes())?;
    cpio::newc::trailer(root.output)?.flush()?;
    Ok(())
}

/// Each on a line of its own, with an end, since a shell does not read a line without one.
fn lines(words: &[impl AsRef<str>]) -> String {
    words
        .iter()
        .flat_map(|word| [word.as_ref(), "\n"])
        .collect()
}

fn add_tools(root: &mut Archive) -> Result<()> {
    let mut libraries = BTreeSet::new();
    for tool in TOOLS {
        let path = find_program(tool).with_context(|| format!("no {tool} in PATH"))?;
        root.copy(&path, &Path::new("bin").join(tool))?;
        libraries.extend(shared_libraries(&path)?);
    }
    for library in libraries {
        root.copy(&library, &library)?;
    }
    Ok(())
}

/// The libraries that a program loads, its loader included; none for a static one.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    // Lines are `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` or `/lib64/ld-linux… (0x…)`.
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("can't start ldd")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("not a dynamic executable") {
            return Ok(Vec::new());
        }
        bail!("ldd {}: {}", program.display(), said.trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let words = text.lines().flat_map(str::split_whitespace);
    Ok(words
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

/// A module as the kernel takes it: Debian compresses them since trixie.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).with_context(|| format!("can't read {}", path.display()));
    }
    let mut command = Command::new("xz");
    command.args(["--decompress", "--stdout"]).arg(path);
    let output = command
        .output()
        .with_context(|| format!("can't start `{}`", shown(&command)))?;
    if !output.status.success() {
        bail!("`{}` failed: {}", shown(&command), output.status);
    }
    Ok(output.stdout)
}

/// A cpio archive in the making.
struct Archive {
    output: BufWriter<fs::File>,
    folders: BTreeSet<PathBuf>,
    inode: u32,
}

impl Archive {
    /// Copies a file with its right to execute, to this place below the root.
    fn copy(&mut self, from: &Path, to: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("can't read {}", from.display()))?;
        let to = to
            .to_str()
            .context("a path that is not UTF-8")?
            .trim_start_matches('/');
        self.file(to, 0o755, &content)
    }

    fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> Result<()> {
        self.entry(path, 0o100_000 | permissions, content)
    }

    fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.entry(path, 0o120_777, target.as_bytes())
    }

    /// Adds an entry, after the folders that it lies in.
    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let parents: Vec<_> = Path::new(path).ancestors().skip(1).collect();
        for folder in parents
            .into_iter()
            .rev()
            .filter(|folder| !folder.as_os_str().is_empty())
        {
            if self.folders.insert(folder.to_owned()) {
                self.write(
                    &String::from_utf8_lossy(folder.as_os_str().as_bytes()),
                    0o040_755,
                    &[],
                )?;
            }
        }
        self.write(path, mode, content)
    }

    fn write(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len())
            .with_context(|| format!("{path} is too large for an initramfs"))?;
        let mut entry = cpio::NewcBuilder::new(path)
            .ino(self.inode)
            .mode(mode)
            .write(&mut self.output, size);
        entry.write_all(content)?;
        entry.finish()?;
        Ok(())
    }
}
