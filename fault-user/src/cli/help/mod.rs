//! `fault help`: the help of a subcommand, or the reference of the rule language.

use std::io::stdout;

use anyhow::anyhow;
use clap::{Args, Command, CommandFactory as _};

use super::{Cli, Failure, Outcome, exit};
use crate::rule::nearest;
use crate::tell;

mod page;

/// The reference of the rule language, in Markdown.
const RULES: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/rules.md"));

/// The topic that is not a subcommand.
const TOPIC: &str = "rules";

/// The widest text, in columns; wider ones are hard to read.
const MAX_WIDTH: usize = 110;

/// Print the help of a subcommand, or with `rules` the reference of the rule language.
#[derive(Debug, Args)]
pub struct HelpArgs {
    /// `rules`, or a subcommand; default: all subcommands.
    #[arg(value_name = "TOPIC")]
    topic: Vec<String>,
}

impl HelpArgs {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// There is no such topic, or standard output is closed.
    pub fn execute(self) -> Outcome {
        let text = match self.topic.as_slice() {
            [topic] if topic == TOPIC => rules(width()),
            words => of_command(words)?,
        };
        tell::data(&text)?;
        Ok(exit::SUCCESS)
    }
}

/// The help of a subcommand, or of `fault` for no words.
fn of_command(words: &[String]) -> Result<String, Failure> {
    let help = command(words)?.render_long_help();
    Ok(if tell::has_color(&stdout()) {
        help.ansi().to_string()
    } else {
        help.to_string()
    })
}

/// The subcommand with this path, or `fault` itself for no words.
///
/// # Errors
/// There is none.
pub fn command(words: &[String]) -> Result<Command, Failure> {
    let mut command = Cli::command();
    command.build();
    for word in words {
        let Some(inner) = command.find_subcommand(word) else {
            return Err(unknown(word, &command));
        };
        command = inner.clone();
    }
    Ok(command)
}

fn unknown(word: &str, command: &Command) -> Failure {
    let names = command.get_subcommands().map(Command::get_name);
    let hint = match nearest(word, names.chain([TOPIC])) {
        Some(name) => format!("did you mean `{name}`?"),
        None => "`fault help` lists the commands, `fault help rules` explains the rules".to_owned(),
    };
    Failure::usage(anyhow!("there is no help on `{word}`\nhelp: {hint}"))
}

/// The reference of the rule language for a terminal of so many columns.
#[must_use]
pub fn rules(width: usize) -> String {
    page::of_markdown(RULES, width)
}

/// The terminal's columns, or 80 where there is none.
fn width() -> usize {
    textwrap::termwidth().min(MAX_WIDTH)
}
