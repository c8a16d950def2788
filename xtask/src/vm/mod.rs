//! `cargo xtask vm`: the tests of the data plane on other kernels, each in a virtual machine.
//!
//! A machine is Debian's own kernel under qemu and an initramfs that holds static test programs and
//! the few tools they call. Software emulation, so that it works inside a virtual machine too.

mod boot;
mod initramfs;
mod kernel;

use std::{collections::BTreeSet, fs, path::PathBuf, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};

use self::{boot::Outcome, kernel::Kernel};
use crate::{
    setup::{self, Need},
    workspace::{Executable, build_executables, build_static, root},
};

/// The test programs that run on every kernel, by name: a library's unit tests, or a folder of
/// `fault-user/tests`. A `*` at the end stands for any rest. A row that fits no program is an error.
const SUITES: &[&str] = &[
    "fault_common",
    "fault_user",
    "packets",
    "streams",
    "processes",
];

/// Run the tests of the data plane on other kernels, in virtual machines.
#[derive(clap::Args)]
pub struct Arguments {
    /// Which kernels, as `5.10 6.1 6.12 newest`; all when none is named
    #[arg(value_name = "KERNEL")]
    kernels: Vec<String>,
    /// Run these test programs instead of the ones that run by default
    #[arg(long = "test", value_name = "NAME")]
    tests: Vec<String>,
    /// Look for newer packages of kernels that were fetched before
    #[arg(long)]
    update: bool,
    /// Machines that run at the same time; each keeps a processor busy, and tests of time need one that is idle
    #[arg(long, value_name = "N", default_value_t = 1)]
    at_once: usize,
    /// Cut a machine off that prints nothing for so many seconds
    #[arg(long = "silence-limit", value_name = "SECONDS", default_value_t = 180)]
    silence_limit_s: u64,
    /// Cut a machine off after so many seconds
    #[arg(long = "time-limit", value_name = "SECONDS", default_value_t = 1200)]
    time_limit_s: u64,
    /// What to pass to the test programs, such as part of a test's name
    #[arg(last = true, value_name = "ARGUMENT")]
    for_tests: Vec<String>,
}

/// Where kernels, initramfs and console logs are kept; git ignores it.
fn cache() -> PathBuf {
    root().join(".vm")
}

/// Runs the subcommand.
///
/// # Errors
/// Fails when a kernel can't be had, and when a test fails, hangs or skips what its kernel can do.
pub fn run(arguments: &Arguments) -> Result<()> {
    let names = kernel::names(&arguments.kernels)?;
    setup::require(&[Need::Vm])?;
    let programs = programs(arguments)?;
    let mut failed = Vec::new();
    let mut reports = Vec::new();
    let kernels: Vec<_> = names
        .iter()
        .map(|name| Kernel::fetch(name, arguments.update))
        .collect::<Result<_>>()?;
    let expected: BTreeSet<_> = programs.suites.iter().map(|suite| &*suite.name).collect();
    for some in kernels.chunks(arguments.at_once.max(1)) {
        let outcomes: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> = some
                .iter()
                .map(|kernel| scope.spawn(|| test(kernel, &programs, arguments)))
                .collect();
            running
                .into_iter()
                .map(|one| {
                    one.join()
                        .map_err(|_| anyhow!("a machine's thread panicked"))?
                })
                .collect::<Result<_>>()
        })?;
        for (kernel, outcome) in some.iter().zip(&outcomes) {
            let problems = outcome.problems(&expected);
            reports.push(report(kernel, outcome, &problems));
            if !problems.is_empty() {
                failed.push(kernel.name);
            }
        }
    }
    println!("\n{}", reports.join("\n"));
    if !failed.is_empty() {
        bail!("failed on {}", failed.join(", "));
    }
    Ok(())
}

/// Runs the test programs on one kernel.
fn test(kernel: &Kernel, programs: &Programs, arguments: &Arguments) -> Result<Outcome> {
    let archive = cache()
        .join("initramfs")
        .join(format!("{}.cpio", kernel.name));
    initramfs::pack(&archive, kernel, programs, &arguments.for_tests)?;
    let outcome = boot::boot(
        kernel,
        &archive,
        Duration::from_secs(arguments.silence_limit_s),
        Duration::from_secs(arguments.time_limit_s),
    )?;
    fs::remove_file(&archive).with_context(|| format!("can't remove {}", archive.display()))?;
    Ok(outcome)
}

/// What goes into the initramfs besides the tools.
struct Programs {
    fault: Executable,
    suites: Vec<Executable>,
}

fn programs(arguments: &Arguments) -> Result<Programs> {
    let mut build = build_static("build");
    let fault = build_executables(build.args(["--package=fault-user", "--bin=fault"]))?
        .pop()
        .context("cargo built no program")?;
    let mut build = build_static("test");
    build.args(["--no-run", "--package=fault-common", "--package=fault-user"]);
    build.args(targets(&arguments.tests));
    let mut suites = build_executables(&mut build)?;
    suites.retain(|program| program.is_test);
    let wanted: Vec<&str> = if arguments.tests.is_empty() {
        SUITES.to_vec()
    } else {
        arguments.tests.iter().map(String::as_str).collect()
    };
    for pattern in &wanted {
        if !suites.iter().any(|program| fits(pattern, &program.name)) {
            let names: Vec<_> = suites.iter().map(|program| program.name.as_str()).collect();
            bail!(
                "no test program fits `{pattern}`; there are: {}",
                names.join(", ")
            );
        }
    }
    suites.retain(|program| wanted.iter().any(|pattern| fits(pattern, &program.name)));
    Ok(Programs { fault, suites })
}

/// What cargo is to build for these tests: the folders that are named, where all are; else all. Of none, `SUITES`.
fn targets(tests: &[String]) -> Vec<String> {
    let folder = root().join("fault-user/tests");
    let is_file = |name: &&String| folder.join(name).join("main.rs").is_file();
    if tests.is_empty() {
        let files = SUITES
            .iter()
            .map(|name| (*name).to_owned())
            .filter(|name| is_file(&name));
        let files = files.map(|name| format!("--test={name}"));
        return files.chain(["--lib".to_owned()]).collect();
    }
    if !tests.iter().all(|name| is_file(&name)) {
        return vec!["--lib".to_owned(), "--tests".to_owned()];
    }
    tests.iter().map(|name| format!("--test={name}")).collect()
}

fn fits(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    }
}

fn report(kernel: &Kernel, outcome: &Outcome, problems: &[String]) -> String {
    let verdict = if problems.is_empty() {
        "passed"
    } else {
        "FAILED"
    };
    let mut lines = vec![format!(
        "{:8} {verdict}  {} in {} s: {} tests passed, {} failed, {} skipped",
        kernel.name,
        kernel.release,
        outcome.duration.as_secs(),
        outcome.passed,
        outcome.failed,
        outcome.skips.len(),
    )];
    lines.push(format!("           has {}", outcome.features.join(" ")));
    for skip in &outcome.skips {
        lines.push(format!("           skipped {}: {}", skip.test, skip.reason));
    }
    for problem in problems {
        lines.push(format!("           {problem}"));
    }
    if !problems.is_empty() {
        lines.push(format!("           console: {}", outcome.console.display()));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn a_star_stands_for_any_rest() {
        assert!(fits("kernel_*", "kernel_loss") && fits("demo", "demo"));
        assert!(!fits("kernel_*", "demo") && !fits("demo", "demo2"));
    }
}
