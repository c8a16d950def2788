//! Ready steps for the `cucumber` crate: what the network does to named servers. Copy this file beside your features.
//!
//! | step | rule |
//! |---|---|
//! | `'NAME' is at TARGET` | none: says where the server is, such as `tcp:3306` |
//! | `'NAME' is down` | `down`: refused, open connections reset |
//! | `'NAME' is slow by DURATION` | `delay=DURATION dir=to-client`: delays every packet from it, also on open connections |
//! | `'NAME' times out` | `blackhole` |
//! | `'NAME' resets` | `reset match=data`: connections are accepted, data resets them |
//! | `'NAME' is up` | removes them all; each must have fired |
//! | `'NAME' recovers within DURATION` | none: what [`Faulty::works`] says of NAME must become true in time |
//!
//! Each is a Given, a When and a Then. Faults end with their scenario.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cucumber::step::{Context, Step};
use cucumber::{Cucumber, World, cli, parser, runner, writer};
use regex::Regex;

/// How often a recovery is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// A world with servers that faults can be injected into.
pub trait Faulty: World {
    /// Its servers.
    fn network(&mut self) -> &mut Network;

    /// Whether a server, or what depends on it, works.
    fn works(&mut self, name: &str) -> impl Future<Output = bool>;
}

/// Named servers, and the faults injected into them.
#[derive(Debug)]
pub struct Network {
    program: PathBuf,
    targets: HashMap<String, String>,
    faults: Vec<(String, Fault)>,
}

impl Default for Network {
    /// With the `fault` that is in PATH.
    fn default() -> Self {
        Self::by("fault")
    }
}

impl Network {
    /// With the program `fault` that lies here. It needs root.
    pub fn by(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            targets: HashMap::new(),
            faults: Vec::new(),
        }
    }

    /// Injects a fault into a server.
    fn inject(&mut self, name: &str, fault: &str) {
        let target = self.targets.get(name);
        let target = target.unwrap_or_else(|| {
            panic!("nobody knows '{name}': say `Given '{name}' is at tcp:PORT` before")
        });
        let fault = Fault::on(&self.program, &format!("{target} {fault}"));
        self.faults.push((name.to_owned(), fault));
    }

    /// Removes all faults of a server.
    fn restore(&mut self, name: &str) {
        for (_, fault) in self.faults.extract_if(.., |(faulty, _)| faulty == name) {
            fault.lift();
        }
    }
}

/// A rule that is applied while this value, or the process that owns it, lives.
#[derive(Debug)]
struct Fault(Child);

impl Fault {
    fn on(program: &Path, rule: &str) -> Self {
        let mut child = Command::new(program)
            .args(["run", "--scope", "host", "-r", rule])
            .args(["--", "sh", "-c", "echo ready; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{} can't be started: {error}", program.display()));
        let mut line = String::new();
        if let Some(output) = child.stdout.as_mut() {
            BufReader::new(output)
                .read_line(&mut line)
                .expect("a pipe can be read");
        }
        let mut fault = Self(child);
        assert!(line == "ready\n", "{rule}: {}", fault.end());
        fault
    }

    /// Lifts it, and gives what it told.
    fn end(&mut self) -> String {
        drop(self.0.stdin.take());
        let mut told = String::new();
        if let Some(mut errors) = self.0.stderr.take() {
            errors
                .read_to_string(&mut told)
                .expect("a pipe can be read");
        }
        told
    }

    /// Lifts it. A fault that never fired has tested nothing.
    fn lift(mut self) {
        let told = self.end();
        let status = self.0.wait().expect("it is our child");
        assert!(status.success(), "{told}");
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        if let Err(error) = self.0.wait() {
            eprintln!("waiting for fault: {error}");
        }
    }
}

/// What a step does.
type Doing<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Cucumber with the default parser, runner and some writer.
type Runner<W, I, Wr> = Cucumber<W, parser::Basic, I, runner::Basic<W>, Wr, cli::Empty>;

/// Adds the steps.
pub fn with_fault_steps<W, I, Wr>(cucumber: Runner<W, I, Wr>) -> Runner<W, I, Wr>
where
    W: Faulty,
    I: AsRef<Path>,
    Wr: writer::Writer<W>,
{
    let steps: [(&str, Step<W>); 7] = [
        ("is at (.+)$", is_at),
        ("is down$", is_down),
        ("is up$", is_up),
        ("is slow by (.+)$", is_slow),
        ("times out$", times_out),
        ("resets$", resets),
        ("recovers within (.+)$", recovers),
    ];
    steps.into_iter().fold(cucumber, |cucumber, (end, step)| {
        let regex = Regex::new(&format!("^'([^']+)' {end}")).expect("it is constant");
        cucumber
            .given(regex.clone(), step)
            .when(regex.clone(), step)
            .then(regex, step)
    })
}

/// A part of the step that the expression has caught, from 1.
fn part(context: &Context, number: usize) -> &str {
    context.matches.get(number).map_or("", |(_, text)| text)
}

fn is_at<W: Faulty>(world: &mut W, context: Context) -> Doing<'_> {
    Box::pin(async move {
        let (name, target) = (part(&context, 1).to_owned(), part(&context, 2).to_owned());
        world.network().targets.insert(name, target);
    })
}

fn is_down<W: Faulty>(world: &mut W, context: Context) -> Doing<'_> {
    Box::pin(async move { world.network().inject(part(&context, 1), "down") })
}

fn is_up<W: Faulty>(world: &mut W, context: Context) -> Doing<'_> {
    Box::pin(async move { world.network().restore(part(&context, 1)) })
}

fn is_slow<W: Faulty>(world: &mut W, context: Context) -> Doing<'_> {
    Box::pin(async move {
        let fault = format!("delay={} dir=to-client", part(&context, 2));
        world.network().inject(part(&context, 1), &fault);
    })
}

fn times_out<W: Faulty>(world: &mut W, context: Context) -> Doing<'_> {
    Box::pin(async move { world.network().inject(part(&context, 1), "blackhole") })
}

fn resets<W: Faulty>(world: &mut W, context: Context) -> Doing<'_> {
    Box::pin(async move {
        world
            .network()
            .inject(part(&context, 1), "reset match=data");
    })
}

fn recovers<W: Faulty>(world: &mut W, context: Context) -> Doing<'_> {
    Box::pin(async move {
        let (name, within) = (part(&context, 1), part(&context, 2));
        let end = Instant::now() + duration(within);
        while !world.works(name).await {
            assert!(
                Instant::now() < end,
                "'{name}' did not recover within {within}"
            );
            tokio::time::sleep(LOOK).await;
        }
    })
}

/// Reads `200ms`, `3s` or `1m`.
///
/// # Panics
/// It is none, which fails the step.
pub fn duration(text: &str) -> Duration {
    let units = [("ms", 1), ("s", 1000), ("m", 60_000)];
    units
        .iter()
        .find_map(|(unit, ms)| {
            let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
            Some(Duration::from_millis(count * ms))
        })
        .unwrap_or_else(|| panic!("{text:?} is no duration: expected one such as 200ms or 3s"))
}
