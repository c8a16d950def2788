//! `fault completions` and `fault man`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Command, CommandFactory as _, ValueEnum};
use clap_complete::Shell;
use roff::{Roff, roman};

use super::{Cli, Outcome, exit, help};
use crate::sys::net::interfaces;
use crate::sys::process::container::{self, RuntimePaths};
use crate::tell;

/// Print completions for a shell.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(required_unless_present = "names")]
    shell: Option<Shell>,
    /// Print names instead, one a line: what the completions ask for.
    #[arg(long, value_name = "KIND", hide = true, conflicts_with = "shell")]
    names: Option<CompletedNames>,
}

/// Names that completions offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CompletedNames {
    /// The running containers.
    Containers,
    /// The interfaces.
    Interfaces,
}

impl CompletionsArgs {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// Standard output is closed, or the interfaces can't be listed.
    pub fn execute(self) -> Outcome {
        let text = match (self.names, self.shell) {
            (Some(CompletedNames::Containers), _) => {
                lines(container::running(&RuntimePaths::default()))
            }
            (Some(CompletedNames::Interfaces), _) => {
                lines(interfaces::list()?.into_iter().map(|one| one.name))
            }
            (None, Some(shell)) => completions(shell)?,
            (None, None) => String::new(),
        };
        tell::data(&text)?;
        Ok(exit::SUCCESS)
    }
}

fn lines(names: impl IntoIterator<Item = String>) -> String {
    names.into_iter().map(|name| name + "\n").collect()
}

/// The completions for a shell: of options as `clap_complete` knows them, and of what only the shell or this machine
/// knows: the command after `--`, containers and interfaces.
fn completions(shell: Shell) -> anyhow::Result<String> {
    let mut buffer = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "fault", &mut buffer);
    let text = String::from_utf8(buffer)?;
    Ok(match shell {
        Shell::Bash => text + include_str!("completions/fault.bash"),
        Shell::Fish => text + include_str!("completions/fault.fish"),
        Shell::Zsh => for_zsh(&text),
        _ => text,
    })
}

/// Has the arguments completed by our functions instead of files.
fn for_zsh(text: &str) -> String {
    const END: &str = "if [ \"$funcstack[1]\"";
    let completers = [
        ("--container=[", "_fault_containers"),
        ("--interface=[", "_fault_interfaces"),
        ("-i+[", "_fault_interfaces"),
        ("'*::command -- ", "_normal"),
    ];
    let line = |line: &str| {
        let found = completers.iter().find(|(start, _)| line.contains(start));
        match found {
            Some((_, by)) => line.replace(":_default'", &format!(":{by}'")),
            None => line.to_owned(),
        }
    };
    let text = text.lines().map(line).collect::<Vec<_>>().join("\n") + "\n";
    text.replacen(
        END,
        &format!("{}\n{END}", include_str!("completions/fault.zsh")),
        1,
    )
}

/// Print a manual page, or write all of them to a folder.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// The page: a subcommand, or `rules`; default: the page of fault itself.
    page: Option<String>,
    /// Write all pages to this folder instead.
    #[arg(long, value_name = "DIR", conflicts_with = "page")]
    out: Option<PathBuf>,
}

impl ManArgs {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// There is no such page, the folder can't be written to, or standard output is closed.
    pub fn execute(self) -> Outcome {
        if let Some(folder) = self.out {
            clap_mangen::generate_to(Cli::command(), &folder)
                .and_then(|()| std::fs::write(folder.join("fault-rules.7"), rules()))
                .with_context(|| format!("can't write to {}", folder.display()))?;
            return Ok(exit::SUCCESS);
        }
        let page = match self.page.as_deref() {
            None => rendered(Cli::command())?,
            Some("rules") => rules(),
            Some(name) => rendered(help::command(&[name.to_owned()])?)?,
        };
        tell::data(&String::from_utf8(page)?)?;
        Ok(exit::SUCCESS)
    }
}

/// The manual page of a command.
///
/// # Errors
/// Never: it is written to memory.
pub(super) fn rendered(command: Command) -> anyhow::Result<Vec<u8>> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    Ok(page)
}

/// The page fault-rules(7): the text of `fault help rules`, as it is.
fn rules() -> Vec<u8> {
    const WIDTH: usize = 76;
    let mut page = Roff::new();
    page.control("TH", ["fault-rules", "7"]).control("nf", []);
    for line in help::rules(WIDTH).lines() {
        page.text([roman(line)]);
    }
    page.to_roff().into_bytes()
}
