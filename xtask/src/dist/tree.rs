//! Files on their way into an archive.

use std::{collections::BTreeMap, io::Write as _, path::Path};

use anyhow::Result;
use flate2::{Compression, GzBuilder};

/// Files by path, all of one time and owned by root.
pub struct Tree {
    time_s: u64,
    files: BTreeMap<String, (u32, Vec<u8>)>,
    /// Symbolic links, and where they lead.
    links: BTreeMap<String, String>,
}

impl Tree {
    /// An empty tree.
    pub fn new(time_s: u64) -> Self {
        Self {
            time_s,
            files: BTreeMap::new(),
            links: BTreeMap::new(),
        }
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.files
            .insert(path.to_owned(), (permissions, content.to_owned()));
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.links.insert(path.to_owned(), target.to_owned());
    }

    /// The bytes of all files together.
    pub fn size(&self) -> usize {
        self.files.values().map(|(_, content)| content.len()).sum()
    }

    /// As a tar archive, with the folders that the files lie in.
    ///
    /// # Errors
    /// Fails on a path that tar has no room for.
    pub fn tar(&self) -> Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        let mut folders = std::collections::BTreeSet::new();
        for (path, (permissions, content)) in &self.files {
            let parents: Vec<_> = Path::new(path).ancestors().skip(1).collect();
            for folder in parents
                .into_iter()
                .rev()
                .filter(|one| !one.as_os_str().is_empty())
            {
                if folders.insert(folder) {
                    let mut header = self.header(tar::EntryType::Directory, 0o755, 0);
                    archive.append_data(&mut header, folder, &[][..])?;
                }
            }
            let mut header = self.header(tar::EntryType::Regular, *permissions, content.len());
            archive.append_data(&mut header, path, content.as_slice())?;
        }
        for (path, target) in &self.links {
            let mut header = self.header(tar::EntryType::Symlink, 0o777, 0);
            archive.append_link(&mut header, path, target)?;
        }
        Ok(archive.into_inner()?)
    }

    fn header(&self, kind: tar::EntryType, permissions: u32, size: usize) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(permissions);
        header.set_mtime(self.time_s);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(size as u64);
        header
    }

    /// As a compressed tar archive.
    ///
    /// # Errors
    /// Fails as [`Tree::tar`] does.
    pub fn tar_gz(&self) -> Result<Vec<u8>> {
        gzip(&self.tar()?)
    }
}

/// Compresses, without a time or a name in the result.
pub fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut gzip = GzBuilder::new()
        .mtime(0)
        .write(Vec::new(), Compression::best());
    gzip.write_all(bytes)?;
    Ok(gzip.finish()?)
}
