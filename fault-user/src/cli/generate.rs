//! `fault completions` and `fault man`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Command, CommandFactory as _};
use clap_complete::Shell;
use roff::{Roff, roman};

use super::{Cli, Outcome, exit, help};
use crate::tell;

/// Print completions for a shell.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn execute(self) -> Outcome {
        let mut buffer = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "fault", &mut buffer);
        tell::data(&String::from_utf8(buffer)?)?;
        Ok(exit::SUCCESS)
    }
}

/// Print a manual page, or write all of them to a folder.
#[derive(Debug, Args)]
pub struct Man {
    /// The page: a subcommand, or `rules`; default: the page of fault itself.
    page: Option<String>,
    /// Write all pages to this folder instead.
    #[arg(long, value_name = "DIR", conflicts_with = "page")]
    out: Option<PathBuf>,
}

impl Man {
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

fn rendered(command: Command) -> anyhow::Result<Vec<u8>> {
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
