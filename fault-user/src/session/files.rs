//! The output files of a run.

use std::ffi::OsStr;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use crate::report::file::{self, RunReport};
use crate::report::{github, html, junit};
use crate::sys::process::files::{self, Folder, Growing, Writer};

/// The names of a report's files for CI and for people.
pub const JUNIT: &str = "junit.xml";
/// See [`JUNIT`].
pub const HTML: &str = "report.html";

/// The output files of a run. They are opened before the command starts, which could otherwise interfere.
pub struct Files {
    writer: Option<Writer>,
    folder: Option<Arc<Folder>>,
    report: Option<PathBuf>,
    events: Option<PathBuf>,
    job_summary: Option<PathBuf>,
}

impl Files {
    /// Opens the report's folder, with the rights of the user who called sudo.
    ///
    /// # Errors
    /// The file or folder can't be created.
    pub fn open(report: Option<PathBuf>, events: Option<PathBuf>) -> anyhow::Result<Self> {
        let is_needed = report.is_some() || events.is_some();
        let writer = is_needed.then(Writer::start).transpose()?;
        let folder = match (&writer, report.clone()) {
            (Some(writer), Some(path)) => Some(writer.run(move || {
                let folder = Folder::make(&path)?;
                for name in [file::REPORT, JUNIT, HTML] {
                    folder.tidy(OsStr::new(name))?;
                }
                Ok(Arc::new(folder))
            })?),
            _ => None,
        };
        Ok(Self {
            writer,
            folder,
            report,
            events,
            job_summary: github::summary_file(),
        })
    }

    /// The file for decisions that fire, and its path. `None` if neither a report nor events were requested.
    ///
    /// # Errors
    /// The file or folder can't be created.
    pub fn decisions(&self) -> anyhow::Result<Option<(File, PathBuf)>> {
        let Some(writer) = &self.writer else {
            return Ok(None);
        };
        let path = match (&self.report, &self.events) {
            (Some(folder), _) => folder.join(file::DECISIONS),
            (None, Some(path)) => path.clone(),
            (None, None) => return Ok(None),
        };
        let (folder, named) = (self.folder.clone(), path.clone());
        let file = writer.run(move || match folder {
            Some(folder) => folder.create(OsStr::new(file::DECISIONS)),
            None => files::create(&named),
        })?;
        Ok(Some((file, path)))
    }

    /// Whether the report's folder has a file of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        let folder = self.folder.as_ref();
        folder.is_some_and(|folder| folder.has_regular(OsStr::new(name)))
    }

    /// Writes all files of a report.
    ///
    /// # Errors
    /// One of them can't be written.
    pub fn report(&self, report: &RunReport) -> anyhow::Result<()> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        self.write([
            (file::REPORT, serde_json::to_vec_pretty(report)?),
            (JUNIT, junit::render(report)?),
            (HTML, html::render(report).into_bytes()),
        ])?;
        match &self.job_summary {
            Some(path) => github::tell(report, path.clone(), writer),
            None => Ok(()),
        }
    }

    /// Writes files into the report's folder, if there is one. Each takes the place of the one that was there when it is
    /// whole.
    ///
    /// # Errors
    /// One of them can't be written; then the one that was there stays.
    pub fn write(
        &self,
        texts: impl IntoIterator<Item = (&'static str, Vec<u8>)>,
    ) -> anyhow::Result<()> {
        let (Some(writer), Some(folder)) = (&self.writer, &self.folder) else {
            return Ok(());
        };
        for (name, text) in texts {
            let folder = Arc::clone(folder);
            writer.run(move || folder.replace(OsStr::new(name), &text))?;
        }
        Ok(())
    }
}

/// A list of JSON in a file of the report's folder that grows by one after the other, if there is a folder. The file is whole at
/// any time.
#[derive(Default)]
pub enum GrowingList {
    /// There is no item yet.
    #[default]
    Empty,
    /// The file has all items so far.
    Growing(Growing),
    /// The first item was written to a pipe or a device, which can't grow.
    Ungrowing,
}

impl GrowingList {
    /// Adds an item. Before the first one the file is made, of what `begin` gives: what comes before the items that are
    /// added and what comes after them.
    ///
    /// # Errors
    /// It can't be written; then the file stays as it was.
    pub fn add(
        &mut self,
        files: &Files,
        name: &'static str,
        begin: impl FnOnce() -> anyhow::Result<(Vec<u8>, Vec<u8>)>,
        item: Vec<u8>,
    ) -> anyhow::Result<()> {
        let (Some(writer), Some(folder)) = (&files.writer, &files.folder) else {
            return Ok(());
        };
        match std::mem::take(self) {
            Self::Empty => {
                let (head, tail) = begin()?;
                let folder = Arc::clone(folder);
                let head = [head, item].concat();
                let growing =
                    writer.run(move || Growing::begin(folder, OsStr::new(name), &head, &tail))?;
                *self = growing.map_or(Self::Ungrowing, Self::Growing);
                Ok(())
            }
            Self::Growing(mut growing) => {
                // Without the thread that writes, what follows fails as well: it begins anew.
                let (growing, added) = writer.run(move || {
                    let added = growing.add(&[b",\n", item.as_slice()].concat());
                    Ok((growing, added))
                })?;
                *self = Self::Growing(growing);
                added
            }
            Self::Ungrowing => {
                *self = Self::Ungrowing;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> (tempfile::TempDir, Files) {
        let folder = tempfile::tempdir().unwrap();
        let path = std::fs::canonicalize(folder.path()).unwrap();
        for name in [file::REPORT, JUNIT, HTML] {
            std::fs::write(path.join(format!("{name}.part")), "half").unwrap();
        }
        std::fs::write(path.join("other.part"), "mine").unwrap();
        (folder, Files::open(Some(path), None).unwrap())
    }

    #[test]
    fn what_a_killed_run_left_behind_is_removed() {
        let (folder, files) = files();
        let left = std::fs::read_dir(folder.path()).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["other.part"]);
        assert!(!files.has(file::REPORT));
        files.write([(file::REPORT, b"{}".to_vec())]).unwrap();
        assert!(files.has(file::REPORT));
    }

    #[test]
    fn an_item_that_is_not_written_is_an_error() {
        let (_folder, files) = files();
        let mut list = GrowingList::default();
        let add = |list: &mut GrowingList| {
            let begin = || Ok((b"[".to_vec(), b"]".to_vec()));
            list.add(&files, file::REPORT, begin, b"1".to_vec())
        };
        add(&mut list).unwrap();
        let writer = files.writer.as_ref().unwrap();
        let ended: anyhow::Result<()> = writer.run(|| panic!("the thread ends, as it is meant to"));
        assert!(ended.is_err());
        for _ in 0..2 {
            let error = add(&mut list).unwrap_err().to_string();
            assert_eq!(error, "the thread that writes files has ended");
        }
    }
}
