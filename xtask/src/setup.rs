//! `cargo xtask setup`: installs what this machine lacks, or says what to type.

use std::{
    fs, io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use nix::unistd::Uid;

use crate::workspace::{cargo, find_program, output, root, run as run_command, shown, tool};

/// From 0.11 on bpf-linker needs a system LLVM; this one loads the LLVM of rustc.
const BPF_LINKER_VERSION: &str = "0.10.3";

/// What a part of the project's work needs.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Need {
    /// The eBPF object from source (a plain `cargo build` needs nothing but stable Rust)
    Build,
    /// `cargo xtask test`
    Test,
    /// `cargo xtask vm`
    Vm,
    /// `cargo xtask bench`
    Bench,
    /// `cargo xtask fuzz`
    Fuzz,
    /// The tests that aim at containers
    Containers,
}

/// A package of Debian's, and what wants it.
struct Package {
    name: &'static str,
    /// A program of it, by which it is found where packages have other names. Libraries have none.
    program: Option<&'static str>,
    needs: &'static [Need],
}

/// Everything that comes from the distribution. To need one more, add a row.
const PACKAGES: &[Package] = &[
    package(
        "gcc",
        Some("cc"),
        &[Need::Build, Need::Test, Need::Vm, Need::Bench],
    ),
    package(
        "libc6-dev",
        None,
        &[Need::Build, Need::Test, Need::Vm, Need::Bench],
    ),
    package("sudo", Some("sudo"), &[Need::Test]),
    package("curl", Some("curl"), &[Need::Test]),
    package("bash-completion", None, &[Need::Test]),
    package("zsh", Some("zsh"), &[Need::Test]),
    package("fish", Some("fish"), &[Need::Test]),
    package("rustc-web", None, &[Need::Build]),
    package("cargo-web", None, &[Need::Build]),
    package("libstd-rust-web-dev-bpf", None, &[Need::Build]),
    package("rust-web-clippy", None, &[Need::Build]),
    package(
        "iproute2",
        Some("tc"),
        &[Need::Test, Need::Vm, Need::Bench, Need::Containers],
    ),
    package("bpftool", Some("bpftool"), &[Need::Test, Need::Vm]),
    package("iputils-ping", Some("ping"), &[Need::Test, Need::Vm]),
    package("redis-server", Some("redis-server"), &[Need::Test]),
    package("redis-tools", Some("redis-cli"), &[Need::Test]),
    package("openssl", Some("openssl"), &[Need::Test]),
    package("postgresql", Some("psql"), &[Need::Test]),
    package("mariadb-server", Some("mariadbd"), &[Need::Test]),
    package("nats-server", Some("nats-server"), &[Need::Test]),
    package("python3-pytest", None, &[Need::Test]),
    package("python3-psycopg2", None, &[Need::Test]),
    package("libnats-dev", None, &[Need::Test]),
    package("python3-pymysql", None, &[Need::Test]),
    package("python3-redis", None, &[Need::Test]),
    package("libpython3.11-testsuite", None, &[Need::Test]),
    package("nodejs", Some("node"), &[Need::Test]),
    package("python3-aiohttp", None, &[Need::Test]),
    package("chromium", Some("chromium"), &[Need::Test]),
    package("golang-go", Some("go"), &[Need::Test]),
    package("qemu-system-x86", Some("qemu-system-x86_64"), &[Need::Vm]),
    package(
        "busybox-static",
        Some("busybox"),
        &[Need::Test, Need::Vm, Need::Containers],
    ),
    package("kmod", Some("depmod"), &[Need::Vm]),
    package("dpkg", Some("dpkg-deb"), &[Need::Vm]),
    package("xz-utils", Some("xz"), &[Need::Vm]),
    package("debian-archive-keyring", None, &[Need::Vm]),
    package("g++", Some("c++"), &[Need::Fuzz]),
    package("nftables", Some("nft"), &[Need::Bench]),
    package("ethtool", Some("ethtool"), &[Need::Bench]),
    package("haproxy", Some("haproxy"), &[Need::Bench]),
    package("nginx-light", Some("nginx"), &[Need::Bench]),
    package("libnginx-mod-stream", None, &[Need::Bench]),
    package("iperf3", Some("iperf3"), &[Need::Bench]),
    package("podman", Some("podman"), &[Need::Test, Need::Containers]),
    package("runc", Some("runc"), &[Need::Test, Need::Containers]),
    package(
        "docker.io",
        Some("dockerd"),
        &[Need::Test, Need::Containers],
    ),
    package(
        "iptables",
        Some("iptables"),
        &[Need::Test, Need::Containers],
    ),
];

const fn package(
    name: &'static str,
    program: Option<&'static str>,
    needs: &'static [Need],
) -> Package {
    Package {
        name,
        program,
        needs,
    }
}

/// Install what this machine lacks to build and test fault, or say what to type.
#[derive(clap::Args)]
pub struct Arguments {
    /// What to make ready (more than one with commas)
    #[arg(
        long = "for",
        value_name = "WHAT",
        value_delimiter = ',',
        default_value = "build,test"
    )]
    needs: Vec<Need>,
}

/// Runs the subcommand.
///
/// # Errors
/// Fails when something is missing that can't be installed from here; the error says what to type.
pub fn run(arguments: &Arguments) -> Result<()> {
    require(&arguments.needs)?;
    println!("setup: all is there");
    Ok(())
}

/// Makes sure that all of this is installed, quickly when it is.
///
/// # Errors
/// Fails when something is missing that can't be installed from here; the error says what to type.
pub fn require(needs: &[Need]) -> Result<()> {
    let wanted = PACKAGES
        .iter()
        .filter(|package| package.needs.iter().any(|need| needs.contains(need)));
    if find_program("apt-get").is_some() {
        let missing = missing_on_debian(wanted)?;
        if !missing.is_empty() {
            install(&missing)?;
        }
    } else {
        let missing: Vec<_> = wanted
            .filter(|package| {
                package
                    .program
                    .is_some_and(|name| find_program(name).is_none())
            })
            .map(|package| package.name)
            .collect();
        if !missing.is_empty() {
            bail!(
                "install these with this system's package manager (the names are Debian's): {}",
                missing.join(" ")
            );
        }
        require_rust_source(needs)?;
    }
    if needs.contains(&Need::Build) {
        require_bpf_linker()?;
    }
    Ok(())
}

fn missing_on_debian(wanted: impl Iterator<Item = &'static Package>) -> Result<Vec<&'static str>> {
    let installed = output(
        Command::new("dpkg-query")
            .args(["--show", "--showformat=${Package} ${db:Status-Status}\\n"]),
    )?;
    let installed: std::collections::HashSet<_> = installed
        .lines()
        .filter_map(|line| line.strip_suffix(" installed"))
        .collect();
    Ok(wanted
        .map(|package| package.name)
        .filter(|name| !installed.contains(name))
        .collect())
}

/// Elsewhere than on Debian only rustup brings a `core` for BPF.
fn require_rust_source(needs: &[Need]) -> Result<()> {
    if !needs.contains(&Need::Build) {
        return Ok(());
    }
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    if !Path::new(&sysroot)
        .join("lib/rustlib/src/rust/library/core")
        .is_dir()
    {
        bail!("building the eBPF object needs rust-src: type `rustup component add rust-src`");
    }
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(["install", "--yes", "--no-install-recommends"])
        // Another apt may be at work, as on a machine that has just started.
        .args(["-o", "DPkg::Lock::Timeout=300"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive");
    if !Uid::effective().is_root() {
        bail!(
            "missing {}: type `sudo {}`",
            packages.join(" "),
            shown(&command)
        );
    }
    println!(
        "setup: installing {} packages, which takes some minutes: {}",
        packages.len(),
        packages.join(" ")
    );
    let _services_stay_off = ServicesStayOff::new()?;
    // Some source in the list may be out of reach; what matters is whether the packages are found.
    if let Err(error) = run_command(Command::new("apt-get").args(["update", "--quiet"])) {
        eprintln!("setup: going on with old package lists: {error:#}");
    }
    run_command(&mut command)?;
    // policy-rc.d only holds until the next start of the machine.
    if Path::new("/run/systemd/system").is_dir() {
        for (package, service) in [
            ("redis-server", "redis-server"),
            ("postgresql", "postgresql"),
            ("mariadb-server", "mariadb"),
            ("nats-server", "nats-server"),
            ("podman", "podman.socket"),
            ("docker.io", "docker.socket"),
            ("docker.io", "docker.service"),
            ("haproxy", "haproxy"),
            ("nginx-light", "nginx"),
            ("iperf3", "iperf3"),
        ] {
            if packages.contains(&package) {
                run_command(Command::new("systemctl").args(["disable", service]))?;
            }
        }
    }
    Ok(())
}

/// While this lives, installing a package does not start its service.
///
/// Debian asks the program policy-rc.d, where it exists, before it starts anything; 101 forbids it.
struct ServicesStayOff {
    path: Option<&'static Path>,
}

impl ServicesStayOff {
    fn new() -> Result<Self> {
        let path = Path::new("/usr/sbin/policy-rc.d");
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(path);
        let mut file = match file {
            Ok(file) => file,
            // The machine has a policy of its own, as images for containers do.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Ok(Self { path: None });
            }
            Err(error) => return Err(error).context("can't write /usr/sbin/policy-rc.d"),
        };
        let guard = Self { path: Some(path) };
        io::Write::write_all(&mut file, b"#!/bin/sh\nexit 101\n")?;
        // The umask may have taken the right to execute.
        file.set_permissions(fs::Permissions::from_mode(0o755))?;
        Ok(guard)
    }
}

impl Drop for ServicesStayOff {
    fn drop(&mut self) {
        if let Some(path) = self.path
            && let Err(error) = fs::remove_file(path)
        {
            eprintln!("setup: remove {} by hand: {error}", path.display());
        }
    }
}

fn require_bpf_linker() -> Result<()> {
    let path = tool("bpf-linker");
    if path.is_file() {
        let version = output(Command::new(&path).arg("--version"))?;
        if version == format!("bpf-linker {BPF_LINKER_VERSION}") {
            return Ok(());
        }
    }
    println!("setup: building bpf-linker {BPF_LINKER_VERSION} (about a minute)");
    let mut command = cargo();
    command
        .args(["install", "bpf-linker", "--locked", "--force", "--quiet"])
        .args(["--version", BPF_LINKER_VERSION])
        .arg("--root")
        .arg(root().join(".tools"))
        .env_remove("CARGO_TARGET_DIR");
    run_command(&mut command)
}
