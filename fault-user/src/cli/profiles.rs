//! `fault profiles`.

use clap::Args;
use serde_json::json;

use super::{Outcome, exit, print_json};
use crate::rule::{LinkProfile, PROFILES};
use crate::tell;

/// List the profiles: kinds of links by their names, with their figures and where these come from.
#[derive(Debug, Args)]
pub struct ProfilesArgs {
    /// Print it as JSON.
    #[arg(long)]
    json: bool,
}

impl ProfilesArgs {
    /// Does it.
    ///
    /// # Errors
    /// The list can't be written.
    pub fn execute(self) -> Outcome {
        if self.json {
            print_json(&PROFILES.iter().map(object).collect::<Vec<_>>())?;
        } else {
            let all = PROFILES.iter().map(text);
            tell::data(&format!(
                "Use: fault run -r '* profile=lte' -- CMD. Delays apply to each direction: a round trip takes twice as long.\n\n{}",
                all.collect::<Vec<_>>().join("\n")
            ))?;
        }
        Ok(exit::SUCCESS)
    }
}

fn text(profile: &LinkProfile) -> String {
    let LinkProfile {
        name,
        title,
        rules,
        source,
    } = profile;
    let rules = rules.join("  ");
    format!(
        "{name:<17} {title}\n{:18}{rules}\n{:18}({source})\n",
        "", ""
    )
}

fn object(profile: &LinkProfile) -> serde_json::Value {
    json!({
        "name": profile.name,
        "title": profile.title,
        "rules": profile.rules,
        "source": profile.source,
    })
}
