//! A Debian package: an ar archive of two compressed tar archives. No tool of Debian's is needed.

use anyhow::Result;

use super::{
    Document, Release,
    tree::{Tree, gzip},
};

/// Packs everything that `dpkg --install` puts on a machine.
///
/// # Errors
/// Fails when an archive can't be made.
pub fn pack(
    release: &Release,
    fault: &[u8],
    documents: &[Document],
    licences: &[(&str, Vec<u8>)],
) -> Result<Vec<u8>> {
    let mut data = Tree::new(release.time_s);
    data.file("./usr/bin/fault", 0o755, fault);
    for document in documents {
        // Policy wants manuals compressed.
        let is_manual = document.debian.starts_with("usr/share/man/");
        let text = if is_manual {
            gzip(&document.text)?
        } else {
            document.text.clone()
        };
        data.file(&format!("./{}", document.debian), 0o644, &text);
    }
    let licence: Vec<_> = licences.iter().map(|(_, text)| text.as_slice()).collect();
    data.file(
        "./usr/share/doc/fault/copyright",
        0o644,
        &licence.join(&b"\n\n"[..]),
    );

    let mut control = Tree::new(release.time_s);
    control.file("./control", 0o644, about(release, data.size()).as_bytes());
    let mut archive = ar::Builder::new(Vec::new());
    let members = [
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar.gz", control.tar_gz()?),
        ("data.tar.gz", data.tar_gz()?),
    ];
    for (name, content) in members {
        let mut header = ar::Header::new(name.into(), content.len() as u64);
        header.set_mode(0o100_644);
        header.set_mtime(release.time_s);
        archive.append(&header, content.as_slice())?;
    }
    Ok(archive.into_inner()?)
}

fn about(release: &Release, size: usize) -> String {
    format!(
        "Package: fault\n\
         Version: {}\n\
         Architecture: {}\n\
         Maintainer: The authors of fault <{}>\n\
         Installed-Size: {}\n\
         Section: net\n\
         Priority: optional\n\
         Homepage: {}\n\
         Description: kernel-level network fault injection for tests\n \
         Loses, delays, corrupts, refuses and cuts the network traffic of a command or\n \
         of a service, by eBPF programs in the kernel, and restores it when the command ends.\n",
        release.version,
        release.architecture.debian(),
        env!("CARGO_PKG_REPOSITORY"),
        size.div_ceil(1024),
        env!("CARGO_PKG_REPOSITORY"),
    )
}
