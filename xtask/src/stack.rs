//! How much stack the programs of the eBPF object need, as kernels count it before they load one.
//!
//! A chain of calls may take 512 bytes. Kernels before 6.8 count each frame in steps of 32 bytes
//! (`check_max_stack_depth` of kernel/bpf/verifier.c), also in code that is never reached.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SectionIndex, SymbolKind,
};

/// Bytes that a chain of calls may take.
const LIMIT: u64 = 512;
/// Bytes in whose steps a frame counts.
const STEP: u64 = 32;
/// Bytes of an instruction.
const INSTRUCTION: u64 = 8;

/// A function: its section, and where it begins there.
type Place = (usize, u64);

struct Function {
    name: String,
    stack: u64,
    calls: BTreeSet<Place>,
}

/// Checks every chain of calls of an object.
///
/// # Errors
/// The longest one of a program that needs too much.
pub fn check(object: &[u8]) -> Result<()> {
    let functions = functions(object)?;
    for place in functions.keys() {
        let (total, names) = deepest(&functions, *place, 0);
        if total > LIMIT {
            bail!(
                "these calls take {total} bytes of stack, and kernels before 6.8 allow {LIMIT}: {}",
                names.join(" > ")
            );
        }
    }
    Ok(())
}

/// The chain of calls from here that takes most.
fn deepest(
    functions: &BTreeMap<Place, Function>,
    place: Place,
    depth: usize,
) -> (u64, Vec<String>) {
    /// The kernel's own limit of nested calls; the programs do not recurse.
    const CALLS_MAX: usize = 8;
    let Some(function) = functions.get(&place).filter(|_| depth <= CALLS_MAX) else {
        return (0, Vec::new());
    };
    let own = function.stack.max(1).next_multiple_of(STEP);
    let below = function
        .calls
        .iter()
        .map(|call| deepest(functions, *call, depth + 1));
    let (total, mut names) = below.max_by_key(|(total, _)| *total).unwrap_or_default();
    names.insert(0, format!("{} ({})", function.name, function.stack));
    (total + own, names)
}

fn functions(object: &[u8]) -> Result<BTreeMap<Place, Function>> {
    let file = object::File::parse(object).context("the eBPF object can't be read")?;
    let mut functions = BTreeMap::new();
    for symbol in file
        .symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text)
    {
        let Some(SectionIndex(section)) = symbol.section_index() else {
            continue;
        };
        let name = rustc_demangle::demangle(symbol.name()?).to_string();
        functions.insert(
            (section, symbol.address()),
            Function {
                name,
                stack: 0,
                calls: BTreeSet::new(),
            },
        );
    }
    for section in file.sections() {
        let at = section.index().0;
        let begins: Vec<u64> = functions
            .range((at, 0)..(at + 1, 0))
            .map(|((_, begin), _)| *begin)
            .collect();
        if begins.is_empty() {
            continue;
        }
        let targets = targets(&file, &section)?;
        let data = section.data()?;
        for (index, &begin) in begins.iter().enumerate() {
            let end = begins.get(index + 1).copied().unwrap_or(data.len() as u64);
            let (stack, calls) = read(data, at, begin..end, &targets);
            if let Some(function) = functions.get_mut(&(at, begin)) {
                (function.stack, function.calls) = (stack, calls);
            }
        }
    }
    Ok(functions)
}

/// What the calls of a section that are relocated lead to, by their offset: a function, or what is to be added to the
/// call's own number in a section.
fn targets(
    file: &object::File<'_>,
    section: &object::Section<'_, '_>,
) -> Result<BTreeMap<u64, (usize, Option<u64>)>> {
    let mut targets = BTreeMap::new();
    for (offset, relocation) in section.relocations() {
        let RelocationTarget::Symbol(index) = relocation.target() else {
            continue;
        };
        let symbol = file.symbol_by_index(index)?;
        if let Some(SectionIndex(section)) = symbol.section_index() {
            let function = (symbol.kind() == SymbolKind::Text).then(|| symbol.address());
            targets.insert(offset, (section, function));
        }
    }
    Ok(targets)
}

/// The stack and the calls of the function in a range of a section.
fn read(
    data: &[u8],
    section: usize,
    range: std::ops::Range<u64>,
    targets: &BTreeMap<u64, (usize, Option<u64>)>,
) -> (u64, BTreeSet<Place>) {
    const CALL: u8 = 0x85;
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    const FRAME: u8 = 10;
    const PSEUDO_CALL: u8 = 1;
    let (mut lowest, mut calls) = (0_i64, BTreeSet::new());
    // Registers that have the frame's address.
    let mut frames = BTreeSet::new();
    for offset in range.step_by(8) {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let Some(&[code, registers, low, high, immediate @ ..]) = data
            .get(at..at + 8)
            .and_then(|bytes| <&[u8; 8]>::try_from(bytes).ok())
        else {
            break;
        };
        let (to, from) = (registers & 15, registers >> 4);
        let displacement = i64::from(i16::from_le_bytes([low, high]));
        let immediate = i64::from(i32::from_le_bytes(immediate));
        match (code, code & 7) {
            (CALL, _) if from == PSEUDO_CALL => {
                let (section, begin) = match targets.get(&offset) {
                    Some(&(section, Some(begin))) => (section, Some(begin)),
                    Some(&(section, None)) => (
                        section,
                        u64::try_from(immediate + 1).ok().map(|at| at * INSTRUCTION),
                    ),
                    None => (
                        section,
                        (offset / INSTRUCTION)
                            .checked_add_signed(immediate + 1)
                            .map(|at| at * INSTRUCTION),
                    ),
                };
                calls.extend(begin.map(|begin| (section, begin)));
            }
            (MOVE, _) if from == FRAME => drop(frames.insert(to)),
            (ADD, _) if frames.remove(&to) => lowest = lowest.min(immediate),
            // Loads, by the register that is read; stores, by the one that is written.
            (_, 1) if from == FRAME => lowest = lowest.min(displacement),
            (_, 2 | 3) if to == FRAME => lowest = lowest.min(displacement),
            (MOVE, _) => drop(frames.remove(&to)),
            _ => {}
        }
    }
    (lowest.unsigned_abs(), calls)
}
