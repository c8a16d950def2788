//! The eBPF object in this binary.

use anyhow::{Context as _, Result, anyhow, bail};
use aya::maps::Map;
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader, Pod};
use fault_common::abi::{ABI_SECTION, ABI_VERSION};
use nix::sched::{CloneFlags, unshare};
use object::{Object as _, ObjectSection as _};

use super::mapped::MappedArray;
use super::verifier;

/// The committed object; `cargo xtask build-ebpf` makes it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../ebpf/fault.bpf.o");

/// Creates a loader without the kernel's types, which the programs do not use.
///
/// aya reads and parses all of them for each loader, which takes a third of the start of a run, unless there are none.
/// The loader is therefore created on a thread with another root, where they are not visible. If the root can't be
/// changed they are read, which does no harm.
pub(crate) fn new_loader<'a>() -> EbpfLoader<'a> {
    const NO_TYPES_HERE: &str = "/proc/self";
    std::thread::scope(|scope| {
        let apart = std::thread::Builder::new().spawn_scoped(scope, || {
            if unshare(CloneFlags::CLONE_FS).is_ok()
                && let Err(error) = nix::unistd::chroot(NO_TYPES_HERE)
            {
                log::debug!("reading the kernel's types, as the root can't be changed: {error}");
            }
            EbpfLoader::new()
        });
        // If no thread can be started they are read too.
        apart.map_or_else(
            |_no_thread| EbpfLoader::new(),
            |apart| apart.join().unwrap_or_default(),
        )
    })
}

/// Checks that an object has this binary's version of the map layout.
///
/// # Errors
/// It is not an eBPF object of fault, or has another version.
pub fn check_abi(object: &[u8]) -> Result<()> {
    let file = object::File::parse(object).context("the eBPF object is not an ELF file")?;
    let section = file
        .section_by_name(ABI_SECTION)
        .context("the eBPF object has no version: it was not built for fault")?;
    let found = section
        .data()?
        .first_chunk::<4>()
        .map(|bytes| u32::from_le_bytes(*bytes));
    if found != Some(ABI_VERSION) {
        let found = found.map_or_else(|| "none".to_owned(), |version| version.to_string());
        bail!(
            "the eBPF object has ABI version {found}, this binary needs {ABI_VERSION}: run `cargo xtask build-ebpf` and build again"
        );
    }
    Ok(())
}

/// A program of the object, by its name.
///
/// # Errors
/// There is no such program, or it has another type.
pub fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .with_context(|| format!("the eBPF object has no program {name}"))?
        .try_into()
        .with_context(|| format!("{name} is a program of another kind"))
}

/// Loads a program; the error is one line. The verifier gives up when a signal comes (`EAGAIN`): then it is tried again, a
/// few times as libbpf does.
///
/// # Errors
/// The kernel rejected the program.
pub fn loaded(name: &str, mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<()> {
    const ATTEMPTS: usize = 5;
    let is_interrupted = |status: &Result<(), ProgramError>| {
        matches!(status, Err(ProgramError::LoadError { io_error, .. })
            if io_error.kind() == std::io::ErrorKind::WouldBlock)
    };
    let mut status = load();
    for _ in 1..ATTEMPTS {
        if !is_interrupted(&status) {
            break;
        }
        status = load();
    }
    status.map_err(|error| {
        let summary = verifier::summary(name, &error);
        anyhow!(error).context(summary)
    })
}

/// Maps an array of the object into memory.
///
/// # Errors
/// There is no array with this name and size, or it can't be mapped.
pub fn mapped<T: Pod>(ebpf: &mut Ebpf, name: &str, entries: u32) -> Result<MappedArray<T>> {
    let map = ebpf
        .map(name)
        .with_context(|| format!("the eBPF object has no map {name}"))?;
    let Map::Array(data) = map else {
        bail!("the eBPF object's map {name} is not an array");
    };
    MappedArray::new(data, entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_object_has_this_version() {
        check_abi(OBJECT).unwrap();
    }

    #[test]
    fn another_version_is_refused_in_one_line() {
        let mut object = OBJECT.to_vec();
        let file = object::File::parse(OBJECT).unwrap();
        let (offset, _) = file
            .section_by_name(ABI_SECTION)
            .unwrap()
            .file_range()
            .unwrap();
        object[usize::try_from(offset).unwrap()] = 65;
        let error = check_abi(&object).unwrap_err().to_string();
        assert!(error.contains("ABI version 65"), "{error}");
        assert!(!error.contains('\n'));
        assert!(check_abi(b"no object").is_err());
    }

    #[test]
    fn a_loader_leaves_this_process_its_root() {
        let before = std::fs::read_link("/proc/self/root").unwrap();
        drop(new_loader());
        assert_eq!(std::fs::read_link("/proc/self/root").unwrap(), before);
        assert!(std::path::Path::new("/proc/self/status").exists());
    }
}
