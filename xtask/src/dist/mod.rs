//! `cargo xtask dist`: what users install, from a clean checkout and without any registry of images.
//!
//! The same commit and compiler make the same bytes: times are the commit's, owners are root.

mod deb;
mod image;
mod tree;

use std::{env, fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum as _;
use object::{build::elf::Builder, elf::PT_INTERP};

use self::{image::Kind, tree::Tree};
use crate::{
    build_ebpf::sha256,
    workspace::{build_executables, cargo, cargo_home, find_program, output, root},
};

/// A processor that fault is built for.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
enum Architecture {
    X86_64,
    Aarch64,
}

/// Package fault: static binary, .deb, tarball, image, checksums, all in target/dist.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only this processor; every one that the toolchain here can build for when none is named
    #[arg(long)]
    architecture: Option<Architecture>,
}

/// What all packages say about themselves.
struct Release {
    version: String,
    architecture: Architecture,
    /// Seconds since 1970, of every file in every archive.
    time_s: u64,
}

/// Runs the subcommand.
///
/// # Errors
/// Fails when nothing can be built, or when what was built can't be packaged.
pub fn run(arguments: &Arguments) -> Result<()> {
    let folder = root().join("target/dist");
    if folder.is_dir() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let time_s = time_s()?;
    let mut sums = Vec::new();
    for &architecture in Architecture::value_variants() {
        if arguments
            .architecture
            .is_some_and(|wanted| wanted != architecture)
        {
            continue;
        }
        if let Some(obstacle) = architecture.obstacle()? {
            if arguments.architecture.is_some() {
                bail!("can't build for {}: {obstacle}", architecture.name());
            }
            println!("not built for {}: {obstacle}", architecture.name());
            continue;
        }
        let release = Release {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            architecture,
            time_s,
        };
        for (name, mode, bytes) in package(&release)? {
            let path = folder.join(&name);
            fs::write(&path, &bytes)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
                .with_context(|| format!("can't write {name}"))?;
            println!("target/dist/{name}: {} KiB", bytes.len().div_ceil(1024));
            sums.push(format!("{}  {name}\n", sha256(&bytes)));
        }
    }
    fs::write(folder.join("SHA256SUMS"), sums.concat())?;
    Ok(())
}

/// Builds and packages for one processor; returns the files to publish with their permissions.
fn package(release: &Release) -> Result<Vec<(String, u32, Vec<u8>)>> {
    let binary = build(release.architecture)?;
    let fault = fs::read(&binary).with_context(|| format!("can't read {}", binary.display()))?;
    require_static(&fault)?;
    let documents = documents(&binary, release.architecture)?;
    let licences = ["LICENSE-MIT", "LICENSE-APACHE"]
        .map(|name| fs::read(root().join(name)).map(|text| (name, text)));
    let licences: Vec<_> = licences.into_iter().collect::<std::io::Result<_>>()?;

    let (version, machine) = (&release.version, release.architecture.name());
    let stem = format!("fault-{version}-linux-{machine}");
    let mut tarball = Tree::new(release.time_s);
    tarball.file(&format!("{stem}/fault"), 0o755, &fault);
    let about = fs::read(root().join("README.md")).context("can't read README.md")?;
    tarball.file(&format!("{stem}/README.md"), 0o644, &about);
    for (name, text) in &licences {
        tarball.file(&format!("{stem}/{name}"), 0o644, text);
    }
    for document in &documents {
        tarball.file(&format!("{stem}/{}", document.name), 0o644, &document.text);
    }
    let deb = deb::pack(release, &fault, &documents, &licences)?;
    let image = |kind| image::pack(release, kind, &fault, &licences);
    let (plain, toxiproxy) = (image(Kind::Fault)?, image(Kind::Toxiproxy)?);
    let debian = release.architecture.debian();
    Ok(vec![
        // Without a version: releases/latest/download/NAME is the newest.
        (format!("fault-linux-{machine}"), 0o755, fault),
        (format!("{stem}.tar.gz"), 0o644, tarball.tar_gz()?),
        (format!("fault_{version}_{debian}.deb"), 0o644, deb),
        (format!("{stem}.oci.tar"), 0o644, plain),
        (
            format!("fault-toxiproxy-{version}-linux-{machine}.oci.tar"),
            0o644,
            toxiproxy,
        ),
    ])
}

fn build(architecture: Architecture) -> Result<std::path::PathBuf> {
    let target = architecture.target();
    let variable = |what: &str| {
        format!(
            "CARGO_TARGET_{}_{what}",
            target.to_uppercase().replace('-', "_")
        )
    };
    // Paths of this machine have no place in what others run.
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        format!("--remap-path-prefix={}=.", root().display()),
        format!("--remap-path-prefix={}=cargo", cargo_home()?.display()),
    ];
    let mut command = cargo();
    command
        .args([
            "build",
            "--release",
            "--locked",
            "--package=fault-user",
            "--bin=fault",
        ])
        .args(["--target", target])
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env("CARGO_PROFILE_RELEASE_DEBUG", "none")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_LTO", "thin")
        .arg("--target-dir")
        .arg(root().join("target/dist-build"));
    if let Some(linker) = architecture.linker() {
        command.env(variable("LINKER"), linker);
    }
    let built = build_executables(&mut command)?.pop();
    Ok(built.context("cargo built no program")?.path)
}

impl Architecture {
    fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// The name that Debian has for it, and images too.
    fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    fn is_of_this_machine(self) -> bool {
        env::consts::ARCH == self.name()
    }

    /// The linker to name to cargo, where its own choice would be this machine's.
    fn linker(self) -> Option<String> {
        (!self.is_of_this_machine()).then(|| format!("{}-linux-gnu-gcc", self.name()))
    }

    /// Why nothing can be built for it here, and what would change that.
    fn obstacle(self) -> Result<Option<String>> {
        let target = self.target();
        let folder = output(cargo_rustc().args(["--print", "target-libdir", "--target", target]))?;
        if !Path::new(&folder).is_dir() {
            return Ok(Some(format!("type `rustup target add {target}`")));
        }
        let missing = self
            .linker()
            .filter(|linker| find_program(linker).is_none());
        Ok(missing.map(|linker| {
            format!(
                "no {linker} in PATH; Debian has it as gcc-{}-linux-gnu",
                self.name()
            )
        }))
    }
}

/// The compiler that cargo takes.
fn cargo_rustc() -> Command {
    Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
}

/// A file of documentation, made by the program itself.
struct Document {
    /// Its path below the tarball's own folder.
    name: String,
    /// Where a Debian package has it.
    debian: String,
    text: Vec<u8>,
}

/// The manual and the completions. A program for another processor can't be asked; the sources are
/// the same, so this machine's own is.
fn documents(binary: &Path, architecture: Architecture) -> Result<Vec<Document>> {
    const SHELLS: &[(&str, &str, &str)] = &[
        (
            "bash",
            "fault.bash",
            "usr/share/bash-completion/completions/fault",
        ),
        ("zsh", "_fault", "usr/share/zsh/vendor-completions/_fault"),
        (
            "fish",
            "fault.fish",
            "usr/share/fish/vendor_completions.d/fault.fish",
        ),
    ];
    let own;
    let binary = if architecture.is_of_this_machine() {
        binary
    } else {
        let here = Architecture::value_variants()
            .iter()
            .find(|one| one.is_of_this_machine());
        own = build(*here.context("the manual can't be made on this processor")?)?;
        &own
    };
    let mut documents = pages(binary)?;
    for (shell, name, debian) in SHELLS {
        let text = output(Command::new(binary).args(["completions", shell]))? + "\n";
        documents.push(Document {
            name: format!("completions/{name}"),
            debian: (*debian).to_owned(),
            text: text.into_bytes(),
        });
    }
    Ok(documents)
}

/// The manual's pages.
fn pages(binary: &Path) -> Result<Vec<Document>> {
    let folder = root().join("target/man");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    output(Command::new(binary).args(["man", "--out"]).arg(&folder))?;
    let mut pages = Vec::new();
    for entry in folder.read_dir()? {
        let path = entry?.path();
        let (Some(name), Some(section)) = (path.file_name(), path.extension()) else {
            continue;
        };
        let (name, section) = (name.to_string_lossy(), section.to_string_lossy());
        pages.push(Document {
            name: format!("man/{name}"),
            debian: format!("usr/share/man/man{section}/{name}.gz"),
            text: fs::read(&path)?,
        });
    }
    pages.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(pages)
}

/// A program that names a loader would not start on a root without libraries.
fn require_static(fault: &[u8]) -> Result<()> {
    let elf = Builder::read(fault).context("what cargo built is no ELF file")?;
    if elf
        .segments
        .iter()
        .any(|segment| segment.p_type == PT_INTERP)
    {
        bail!("what cargo built is not static");
    }
    Ok(())
}

/// The time of all files: `SOURCE_DATE_EPOCH` where it is set, or else the commit's.
fn time_s() -> Result<u64> {
    let text = match env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text,
        Err(_) => {
            output(
                Command::new("git")
                    .current_dir(root())
                    .args(["log", "-1", "--format=%ct"]),
            )
            .context("not a git checkout: set SOURCE_DATE_EPOCH")?
        }
    };
    text.parse()
        .with_context(|| format!("`{text}` is no time in seconds"))
}
