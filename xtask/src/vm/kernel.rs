//! Debian's kernels: found, fetched and checked by apt, which keeps to its own folders here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use nix::unistd::Uid;

use super::cache;
use crate::workspace::{output, run as run_command};

/// The kernels to test on, and the suites of Debian's that have them.
const KERNELS: &[(&str, &[&str])] = &[
    ("5.10", &["bullseye", "bullseye-security"]),
    ("6.1", &["bookworm", "bookworm-security"]),
    ("6.12", &["trixie", "trixie-security"]),
    ("newest", &["sid", "experimental"]),
];

/// The package that stands for the newest kernel of a suite, built for virtual machines.
const PACKAGE: &str = "linux-image-cloud-amd64";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";

/// What the tests need that may be a module. One that is built in, or that a kernel lacks, is no
/// error: the machine tries each feature and says which it has.
const MODULES: &[&str] = &[
    "veth",
    "dummy",
    "ifb",
    "tun",
    "8021q",
    "bridge",
    "vxlan",
    "ipip",
    "wireguard",
    "macvlan",
    "sch_ingress",
    "sch_fq",
    "sch_netem",
    "sch_prio",
    "sch_htb",
    "sch_tbf",
    "sch_fq_codel",
    "sch_cake",
    "cls_bpf",
    "cls_fw",
    "cls_u32",
    "cls_flower",
    "cls_matchall",
    "cls_cgroup",
    "act_bpf",
    "act_gact",
    "act_mirred",
    "act_skbedit",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "tcp_bbr",
    "nf_tables",
    "nft_compat",
    "xt_mark",
    "sctp",
];

/// A kernel on disk.
pub struct Kernel {
    /// What it is called here: `6.12`, `newest`.
    pub name: &'static str,
    /// What `uname -r` says in it.
    pub release: String,
    /// The bootable image.
    pub image: PathBuf,
    /// Its folder of modules.
    modules: PathBuf,
}

/// Checks the kernels that the user names; all when none is named.
///
/// # Errors
/// Fails on a name that is not in the table.
pub fn names(wanted: &[String]) -> Result<Vec<&'static str>> {
    let all = KERNELS.iter().map(|(name, _)| *name);
    if wanted.is_empty() {
        return Ok(all.collect());
    }
    let known: Vec<_> = all.collect();
    wanted
        .iter()
        .map(|name| {
            known
                .iter()
                .copied()
                .find(|known| known == name)
                .with_context(|| {
                    format!(
                        "no kernel `{name}` to test on; there are: {}",
                        known.join(", ")
                    )
                })
        })
        .collect()
}

impl Kernel {
    /// Fetches a kernel, unless it was fetched before.
    ///
    /// # Errors
    /// Fails when the mirror does not have it, or when it is not what Debian signed.
    pub fn fetch(name: &'static str, update: bool) -> Result<Self> {
        let folder = cache().join("kernels").join(name);
        if update && folder.is_dir() {
            fs::remove_dir_all(&folder)?;
        }
        if !folder.is_dir() {
            let suites = KERNELS
                .iter()
                .find(|(known, _)| *known == name)
                .with_context(|| format!("no suites for kernel {name}"))?
                .1;
            // Only a folder that is complete gets its final name.
            let unfinished = folder.with_extension("unfinished");
            if unfinished.is_dir() {
                fs::remove_dir_all(&unfinished)?;
            }
            fs::create_dir_all(&unfinished)?;
            Apt::new(name, suites)?.unpack_kernel(&unfinished)?;
            fs::rename(&unfinished, &folder)?;
        }
        Self::open(name, &folder)
    }

    fn open(name: &'static str, folder: &Path) -> Result<Self> {
        let modules = only_entry(&folder.join("lib/modules"))?;
        let release = modules
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        Ok(Self {
            name,
            release: release.context("a folder of modules without a name")?,
            image: folder.join("vmlinuz"),
            modules,
        })
    }

    /// The files of the modules that the tests need, each after those that it builds on.
    ///
    /// # Errors
    /// Fails when the list that depmod made can't be read.
    pub fn modules(&self) -> Result<Vec<PathBuf>> {
        let file = self.modules.join("modules.dep");
        let text =
            fs::read_to_string(&file).with_context(|| format!("can't read {}", file.display()))?;
        let order = load_order(&text, MODULES)?;
        Ok(order
            .into_iter()
            .map(|path| self.modules.join(path))
            .collect())
    }
}

/// Puts the wanted modules and all that they build on into an order to load them in.
///
/// `modules.dep` has a line for each module, `path: path…`, which names everything that it builds
/// on, directly or not, the one to load first last.
fn load_order<'a>(modules_dep: &'a str, wanted: &[&str]) -> Result<Vec<&'a str>> {
    let mut needs = BTreeMap::new();
    for line in modules_dep.lines() {
        let (path, rest) = line
            .split_once(':')
            .context("a line of modules.dep without a colon")?;
        needs.insert(module_name(path), (path, rest));
    }
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in wanted {
        let Some((path, rest)) = needs.get(*name) else {
            continue;
        };
        for path in rest.split_whitespace().rev().chain([*path]) {
            if seen.insert(path) {
                order.push(path);
            }
        }
    }
    Ok(order)
}

/// `kernel/net/sched/sch-fq.ko.xz` is the module `sch_fq`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// The one entry of a folder that holds no other.
fn only_entry(folder: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(folder)
        .with_context(|| format!("can't read {}", folder.display()))?
        .collect::<std::io::Result<Vec<_>>>()?;
    match (entries.pop(), entries.is_empty()) {
        (Some(entry), true) => Ok(entry.path()),
        _ => bail!("{} does not hold exactly one entry", folder.display()),
    }
}

/// apt with lists and sources of its own: it checks signatures and digests, and leaves the
/// machine's own package state alone.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    fn new(name: &str, suites: &[&str]) -> Result<Self> {
        let folder = cache().join("apt").join(name);
        for part in ["lists/partial", "archives/partial", "packages"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let mirror = mirror()?;
        let sources: Vec<_> = suites
            .iter()
            .map(|suite| {
                let place = if suite.ends_with("-security") {
                    "-security"
                } else {
                    ""
                };
                format!("deb [arch=amd64 signed-by={KEYRING}] {mirror}{place} {suite} main\n")
            })
            .collect();
        fs::write(folder.join("sources.list"), sources.concat())?;
        fs::write(folder.join("apt.conf"), Self::configuration(&folder))?;
        let apt = Self { folder };
        run_command(
            apt.command("apt-get")
                .args(["update", "--quiet", "--error-on=any"]),
        )?;
        Ok(apt)
    }

    /// The settings under which apt works here, as the text of a configuration file.
    fn configuration(folder: &Path) -> String {
        let at = |name: &str| folder.join(name).to_string_lossy().into_owned();
        // The user _apt, whom apt becomes otherwise, can't write into a folder of root's.
        let fetches_as = if Uid::effective().is_root() {
            "root"
        } else {
            ""
        };
        let settings = [
            ("Dir::State", at("")),
            ("Dir::State::lists", at("lists")),
            ("Dir::State::status", "/dev/null".to_owned()),
            ("Dir::Cache", at("")),
            ("Dir::Cache::archives", at("archives")),
            ("Dir::Etc::sourcelist", at("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".to_owned()),
            ("Dir::Etc::preferencesparts", "/dev/null".to_owned()),
            ("APT::Architecture", "amd64".to_owned()),
            ("APT::Sandbox::User", fetches_as.to_owned()),
            ("Acquire::Languages", "none".to_owned()),
            (
                "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
                "false".to_owned(),
            ),
            // An old suite gets no new signatures any more, and is no worse for that.
            ("Acquire::Check-Valid-Until", "false".to_owned()),
        ];
        settings
            .map(|(name, value)| format!("{name} \"{value}\";\n"))
            .concat()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .arg("--config-file")
            .arg(self.folder.join("apt.conf"))
            .current_dir(self.folder.join("packages"));
        command
    }

    /// Fetches the newest kernel of these suites and unpacks it into this folder.
    fn unpack_kernel(&self, folder: &Path) -> Result<()> {
        let packages = self.packages()?;
        println!(
            "vm: fetching {}",
            packages.iter().cloned().collect::<Vec<_>>().join(" ")
        );
        run_command(
            self.command("apt-get")
                .args(["download", "--quiet"])
                .args(&packages),
        )?;
        let fetched = self.folder.join("packages");
        let unpacked = folder.join("unpacked");
        for entry in fs::read_dir(&fetched)? {
            run_command(
                Command::new("dpkg-deb")
                    .arg("--extract")
                    .args([&entry?.path(), &unpacked]),
            )?;
        }
        // Debian moved the modules below /usr in trixie.
        let places = ["lib/modules", "usr/lib/modules"].map(|place| unpacked.join(place));
        let modules = places
            .iter()
            .find(|place| place.is_dir())
            .context("a kernel without modules")?;
        fs::create_dir(folder.join("lib"))?;
        fs::rename(modules, folder.join("lib/modules"))?;
        let modules = only_entry(&folder.join("lib/modules"))?;
        let release = modules
            .file_name()
            .context("a folder of modules without a name")?;
        // The newest kernels come with the image among the modules.
        let in_boot = unpacked
            .join("boot")
            .join(format!("vmlinuz-{}", release.to_string_lossy()));
        let images = [in_boot, modules.join("vmlinuz")];
        let image = images
            .iter()
            .find(|image| image.is_file())
            .context("a kernel without an image")?;
        fs::rename(image, folder.join("vmlinuz"))?;
        run_command(Command::new("depmod").arg("-b").arg(folder).arg(release))?;
        fs::remove_dir_all(&unpacked)?;
        fs::remove_dir_all(&self.folder)?;
        Ok(())
    }

    /// The packages that make up the newest kernel, as `name=version`.
    fn packages(&self) -> Result<BTreeSet<String>> {
        // The newest comes first: ` linux-image-cloud-amd64 | 6.12.117-1 | http://…`.
        let table = output(self.command("apt-cache").args(["madison", PACKAGE]))?;
        let version = table.lines().next().and_then(|line| line.split('|').nth(1));
        let version = version
            .with_context(|| format!("no {PACKAGE} in these suites"))?
            .trim();
        let mut parts = BTreeSet::new();
        let mut queue = vec![format!("{PACKAGE}={version}")];
        while let Some(package) = queue.pop() {
            let about = output(self.command("apt-cache").args(["show", &package]))?;
            let depends = about
                .lines()
                .find_map(|line| line.strip_prefix("Depends: "));
            for part in depends.into_iter().flat_map(kernel_parts) {
                if parts.insert(part.clone()) {
                    queue.push(part);
                }
            }
        }
        Ok(parts)
    }
}

/// Of what a package depends on, the parts of a kernel, which it wants in its own version.
fn kernel_parts(depends: &str) -> impl Iterator<Item = String> {
    depends.split(", ").filter_map(|one| {
        let (name, version) = one.strip_suffix(')')?.split_once(" (= ")?;
        let is_part = ["linux-image-", "linux-binary-", "linux-modules-"]
            .iter()
            .any(|start| {
                // Without a number it only stands for another package, and has no files.
                name.strip_prefix(start)
                    .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
            });
        is_part.then(|| format!("{name}={version}"))
    })
}

/// The mirror that this machine's own sources name, or Debian's own where it is no Debian.
fn mirror() -> Result<String> {
    let sources = output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(LABEL) $(REPO_URI)",
        "Created-By: Packages",
        "Origin: Debian",
    ]))?;
    let mirror = sources
        .lines()
        .find_map(|line| line.strip_prefix("Debian "));
    Ok(mirror
        .unwrap_or(DEFAULT_MIRROR)
        .trim_end_matches('/')
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::{kernel_parts, load_order};

    #[test]
    fn modules_come_after_what_they_build_on() {
        let dep = "kernel/c-c.ko.xz:\nkernel/b.ko: kernel/c-c.ko.xz\n\
                   kernel/a.ko: kernel/b.ko kernel/c-c.ko.xz\nkernel/x.ko:\n";
        let order = load_order(dep, &["a", "c_c", "missing"]).expect("an order");
        assert_eq!(order, ["kernel/c-c.ko.xz", "kernel/b.ko", "kernel/a.ko"]);
    }

    #[test]
    fn a_kernel_may_come_in_several_packages() {
        let depends = "dracut | initramfs-tools (>= 0.120), linux-base-7.3 (= 7.3-1), \
                       linux-binary-7.3 (= 7.3-1), linux-modules-cloud (= 7.3-1), \
                       linux-modules-7.3 (= 7.3-1)";
        let parts: Vec<_> = kernel_parts(depends).collect();
        assert_eq!(parts, ["linux-binary-7.3=7.3-1", "linux-modules-7.3=7.3-1"]);
    }
}
