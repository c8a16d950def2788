//! Profiles: kinds of links by their names. A profile is shorthand for rules.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::dictionary::{PROFILES as PROFILE_NAMES, look_up};
use super::error::{Piece, RuleError, nearest};
use super::faults::Fault;
use super::modifier::Direction;
use super::object::read_text;
use super::{Modifiers, Rule};

/// A kind of link.
pub struct LinkProfile {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub title: &'static str,
    /// The rules that it stands for, without their target. Delays apply to each direction.
    pub rules: &'static [&'static str],
    /// Where the figures come from.
    pub source: &'static str,
}

const WEBPAGETEST: &str = "WebPageTest's connectivity settings";
const STARLINK: &str = "Michel et al., A First Look at Starlink Performance, IMC 2022";

/// Every profile that is known everywhere, from slow to fast.
pub const PROFILES: &[LinkProfile] = &[
    LinkProfile {
        name: "edge",
        title: "a phone on EDGE (2.5G)",
        rules: &[
            "delay=420ms",
            "rate=240kbit dir=to-client",
            "rate=200kbit dir=to-server",
        ],
        source: WEBPAGETEST,
    },
    LinkProfile {
        name: "slow-3g",
        title: "a phone on slow 3G",
        rules: &["delay=200ms", "rate=400kbit"],
        source: WEBPAGETEST,
    },
    LinkProfile {
        name: "3g",
        title: "a phone on 3G",
        rules: &[
            "delay=150ms",
            "rate=1600kbit dir=to-client",
            "rate=768kbit dir=to-server",
        ],
        source: WEBPAGETEST,
    },
    LinkProfile {
        name: "fast-3g",
        title: "a phone on fast 3G",
        rules: &[
            "delay=75ms",
            "rate=1600kbit dir=to-client",
            "rate=768kbit dir=to-server",
        ],
        source: WEBPAGETEST,
    },
    LinkProfile {
        name: "lte",
        title: "a phone on LTE (4G)",
        rules: &["delay=35ms~5ms,dist:normal,keep-order", "rate=12mbit"],
        source: "WebPageTest's connectivity settings; jitter: our choice",
    },
    LinkProfile {
        name: "5g",
        title: "a phone on 5G",
        rules: &[
            "delay=20ms~4ms,dist:normal,keep-order",
            "rate=166mbit dir=to-client",
            "rate=21mbit dir=to-server",
        ],
        source: "rates: Ookla, global medians of the third quarter of 2021; delay and jitter: our choice",
    },
    LinkProfile {
        name: "dsl",
        title: "a home on DSL",
        rules: &[
            "delay=25ms",
            "rate=1500kbit dir=to-client",
            "rate=384kbit dir=to-server",
        ],
        source: WEBPAGETEST,
    },
    LinkProfile {
        name: "cable",
        title: "a home on cable",
        rules: &[
            "delay=14ms",
            "rate=5mbit dir=to-client",
            "rate=1mbit dir=to-server",
        ],
        source: WEBPAGETEST,
    },
    LinkProfile {
        name: "wifi-lossy",
        title: "a laptop far from its access point",
        rules: &[
            "loss=ge(1%,50%)",
            "delay=10ms~5ms,dist:paretonormal,keep-order",
            "rate=10mbit",
        ],
        source: "our choice: 2% of the packets are lost, two in a row on average",
    },
    LinkProfile {
        name: "starlink",
        title: "satellites in low orbit",
        rules: &[
            "loss=0.5%",
            "delay=25ms~7ms,dist:normal,keep-order",
            "rate=178mbit dir=to-client",
            "rate=17mbit dir=to-server",
        ],
        source: STARLINK,
    },
    LinkProfile {
        name: "geo-satellite",
        title: "a geostationary satellite; `satellite` is the same",
        rules: &[
            "delay=300ms~10ms,dist:normal,keep-order",
            "rate=82mbit dir=to-client",
            "rate=4500kbit dir=to-server",
        ],
        source: "Michel et al., A First Look at Starlink Performance, IMC 2022; jitter: our choice",
    },
    LinkProfile {
        name: "transatlantic",
        title: "London to New York",
        rules: &["delay=45ms~1ms,dist:normal,keep-order"],
        source: "Verizon's network latency guarantee, 90 ms; jitter: our choice",
    },
    LinkProfile {
        name: "intercontinental",
        title: "Singapore to the United States",
        rules: &["delay=130ms~3ms,dist:normal,keep-order"],
        source: "Verizon's network latency guarantee, 260 ms; jitter: our choice",
    },
];

impl LinkProfile {
    /// The rules that it stands for, without their target.
    ///
    /// # Panics
    /// Never: a test reads all of them.
    pub fn parts(&self) -> impl Iterator<Item = ProfileRule> {
        let rules = self.rules.iter();
        rules.map(|part| part.parse().expect("a test reads it"))
    }
}

/// One of the rules that a profile stands for, without its target: a fault, and which way it acts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfileRule {
    /// What it does.
    pub fault: Fault,
    /// Which way.
    pub direction: Direction,
}

impl FromStr for ProfileRule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let whole = Piece::whole(text);
        let (fault, modifiers) = super::text::fault_and_modifiers(whole)?;
        let direction = modifiers.direction;
        let plain = Modifiers {
            direction,
            ..Modifiers::default()
        };
        if modifiers != plain {
            return Err(whole
                .error("a part of a profile has no modifier but `dir`")
                .expected("the others in the rule that names the profile"));
        }
        if matches!(fault, Fault::Profile(_)) {
            return Err(whole
                .error("a profile has no profile inside")
                .expected("the faults of that one"));
        }
        Ok(Self { fault, direction })
    }
}

impl fmt::Display for ProfileRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let modifiers = Modifiers {
            direction: self.direction,
            ..Modifiers::default()
        };
        let modifiers = modifiers.to_string();
        let space = if modifiers.is_empty() { "" } else { " " };
        write!(f, "{}{space}{modifiers}", self.fault)
    }
}

impl Serialize for ProfileRule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ProfileRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read_text(deserializer, |piece| piece.text().parse())
    }
}

/// Profiles that a scenario defines, by their names. They come before those that are known everywhere.
pub type Profiles = BTreeMap<String, Vec<ProfileRule>>;

impl Rule {
    /// The rules that a profile stands for, or this one. A direction that the rule has is the only one that is left.
    ///
    /// # Errors
    /// Where there is no such profile, or nothing of it acts that way.
    pub fn expanded(&self, own: &Profiles) -> Result<Vec<Self>, RuleError> {
        let Fault::Profile(profile) = &self.fault else {
            return Ok(vec![self.clone()]);
        };
        let parts = match own.get(&profile.name) {
            Some(parts) => parts.clone(),
            None => known(&profile.name)
                .ok_or_else(|| self.unknown_profile(&profile.name, own))?
                .parts()
                .collect(),
        };
        let rules: Vec<_> = parts.iter().filter_map(|part| self.with(part)).collect();
        for rule in &rules {
            rule.check()?;
        }
        if rules.is_empty() {
            let message = format!("nothing of `{}` acts this way", profile.name);
            return Err(RuleError::of_fault(self.to_string(), &message));
        }
        Ok(rules)
    }

    /// The rule with a part of its profile; nothing where the two act in different directions.
    fn with(&self, part: &ProfileRule) -> Option<Self> {
        let direction = match (self.modifiers.direction, part.direction) {
            (one, other) if one == other => one,
            (Direction::Both, one) | (one, Direction::Both) => one,
            _ => return None,
        };
        Some(Self {
            target: self.target.clone(),
            fault: part.fault.clone(),
            modifiers: Modifiers {
                direction,
                ..self.modifiers.clone()
            },
        })
    }

    fn unknown_profile(&self, name: &str, own: &Profiles) -> RuleError {
        let names = PROFILES.iter().map(|profile| profile.name);
        let names = own
            .keys()
            .map(String::as_str)
            .chain(names)
            .chain([SATELLITE]);
        let meant = look_up(PROFILE_NAMES, name).or_else(|| nearest(name, names));
        let meant = meant.map(|meant| format!("profile={meant}"));
        let message = format!("unknown profile `{name}`");
        RuleError::of_fault(self.to_string(), &message)
            .expected("a name that `fault profiles` lists, or one of the scenario's `profiles`")
            .suggest_some(meant)
    }
}

/// Another name of the profile `geo-satellite`.
const SATELLITE: &str = "satellite";

/// A profile that is known everywhere.
fn known(name: &str) -> Option<&'static LinkProfile> {
    let name = match name {
        SATELLITE => "geo-satellite",
        name => name,
    };
    PROFILES.iter().find(|profile| profile.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(text: &str, own: &Profiles) -> Result<Vec<String>, RuleError> {
        let rule: Rule = text.parse()?;
        let rules = rule.expanded(own)?;
        Ok(rules.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn every_profile_is_rules_that_are_sound_and_has_a_source() {
        for profile in PROFILES {
            let rules = expanded(&format!("* profile={}", profile.name), &Profiles::new());
            let rules = rules.expect(profile.name);
            assert_eq!(rules.len(), profile.parts().count());
            assert!(!profile.source.is_empty() && !profile.title.is_empty());
            let both = ["dir=to-server", "dir=to-client"].map(|way| {
                let text = format!("tcp:443 profile={} {way}", profile.name);
                expanded(&text, &Profiles::new()).expect("a way")
            });
            assert!(both.iter().all(|rules| !rules.is_empty()));
        }
    }

    #[test]
    fn a_profile_has_the_target_and_the_modifiers_of_its_rule() {
        let none = Profiles::new();
        assert_eq!(
            expanded("tcp:443 profile=3g at=2s for=5s conn=1..3", &none).unwrap(),
            [
                "tcp:443 delay=150ms conn=1..3 at=2s for=5s",
                "tcp:443 rate=1.6mbit conn=1..3 dir=to-client at=2s for=5s",
                "tcp:443 rate=96kB/s conn=1..3 dir=to-server at=2s for=5s",
            ]
        );
        assert_eq!(
            expanded("tcp:443 profile=3g dir=to-server", &none).unwrap(),
            [
                "tcp:443 delay=150ms dir=to-server",
                "tcp:443 rate=96kB/s dir=to-server"
            ]
        );
        let satellite = |name| expanded(&format!("* profile={name}"), &none).unwrap();
        assert_eq!(satellite("satellite"), satellite("geo-satellite"));
        assert_eq!(expanded("* loss=5%", &none).unwrap(), ["* loss=5%"]);
    }

    #[test]
    fn a_scenario_has_profiles_of_its_own() {
        let parts = ["loss=1%", "latency=5ms dir=to-client"];
        let parts = parts.map(|part| part.parse().unwrap()).to_vec();
        let own = Profiles::from([("lte".to_owned(), parts)]);
        assert_eq!(
            expanded("tcp:80 profile=lte", &own).unwrap(),
            ["tcp:80 loss=1%", "tcp:80 latency=5ms dir=to-client"]
        );
        let error = expanded("udp:80 profile=phone", &own).unwrap_err();
        assert!(
            error.to_string().contains("unknown profile `phone`"),
            "{error}"
        );
        for wrong in ["loss=1% p=5%", "profile=lte", "", "rate"] {
            assert!(wrong.parse::<ProfileRule>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_nearest_name_is_suggested() {
        let error = expanded("* profile=satelite", &Profiles::new()).unwrap_err();
        assert!(
            error.to_string().contains("did you mean `profile="),
            "{error}"
        );
        let error = expanded("* profile=4g", &Profiles::new()).unwrap_err();
        assert!(error.to_string().contains("fault profiles"), "{error}");
    }
}
