//! The output files of a run.

use std::ffi::OsStr;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use crate::report::file::{self, Report};
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
            (Some(writer), Some(path)) => Some(Arc::new(writer.run(move || Folder::make(&path))?)),
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

    /// Writes all files of a report.
    ///
    /// # Errors
    /// One of them can't be written.
    pub fn report(&self, report: &Report) -> anyhow::Result<()> {
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
pub struct GrowingList {
    growing: Option<Growing>,
    is_begun: bool,
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
        if !self.is_begun {
            let (head, tail) = begin()?;
            let folder = Arc::clone(folder);
            let head = [head, item].concat();
            self.growing =
                writer.run(move || Growing::begin(folder, OsStr::new(name), &head, &tail))?;
            self.is_begun = true;
        } else if let Some(mut growing) = self.growing.take() {
            let (growing, added) = writer.run(move || {
                let added = growing.add(&[b",\n", item.as_slice()].concat());
                Ok((growing, added))
            })?;
            self.growing = Some(growing);
            added?;
        }
        Ok(())
    }
}
