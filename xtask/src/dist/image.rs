//! Images of nothing but the binary, as an archive that `podman load` and `docker load` take.
//!
//! It is an OCI image layout with one addition: the `manifest.json` that older Dockers look for.

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    Release,
    tree::{Tree, gzip},
};
use crate::build_ebpf::sha256;

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// What an image does when it is started.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `fault` with the arguments that are given.
    Fault,
    /// `toxiproxy-server`, as Toxiproxy's own image does: at every address where no arguments are given.
    Toxiproxy,
}

impl Kind {
    /// The image's name, without a version.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fault => "fault",
            Self::Toxiproxy => "fault-toxiproxy",
        }
    }

    fn start(self) -> Value {
        match self {
            Self::Fault => json!({ "Entrypoint": ["/usr/bin/fault"] }),
            Self::Toxiproxy => {
                json!({ "Entrypoint": [SERVER], "Cmd": ["-host=0.0.0.0"] })
            }
        }
    }
}

/// Where Toxiproxy's image has its server.
const SERVER: &str = "/toxiproxy";

/// Packs an image.
///
/// # Errors
/// Fails when an archive can't be made.
pub fn pack(
    release: &Release,
    kind: Kind,
    fault: &[u8],
    licences: &[(&str, Vec<u8>)],
) -> Result<Vec<u8>> {
    let mut root = Tree::new(release.time_s);
    root.file("usr/bin/fault", 0o755, fault);
    for (name, text) in licences {
        root.file(&format!("usr/share/doc/fault/{name}"), 0o644, text);
    }
    root.link(SERVER.trim_start_matches('/'), "/usr/bin/fault");
    root.link("usr/bin/toxiproxy-server", "fault");
    let layer_tar = root.tar()?;
    let layer = gzip(&layer_tar)?;
    let mut config = json!({
        "architecture": release.architecture.debian(),
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/bin"],
            "Labels": {
                "org.opencontainers.image.title": kind.name(),
                "org.opencontainers.image.version": release.version,
                "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
                "org.opencontainers.image.source": env!("CARGO_PKG_REPOSITORY"),
            },
        },
        "rootfs": { "type": "layers", "diff_ids": [digest(&layer_tar)] },
    });

    if let (Some(config), Value::Object(start)) = (config["config"].as_object_mut(), kind.start()) {
        config.extend(start);
    }

    let mut archive = Tree::new(release.time_s);
    let mut blob = |media_type: &str, content: &[u8]| {
        archive.file(&blob_path(content), 0o644, content);
        json!({ "mediaType": media_type, "digest": digest(content), "size": content.len() })
    };
    let config = serde_json::to_vec(&config)?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": blob(CONFIG_TYPE, &config),
        "layers": [blob(LAYER_TYPE, &layer)],
    }))?;
    let mut manifest = blob(MANIFEST_TYPE, &manifest);
    // `localhost` is what both engines call an image that came from no registry.
    let name = format!("localhost/{}:{}", kind.name(), release.version);
    manifest["annotations"] = json!({
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": release.version,
    });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    let for_docker = json!([{
        "Config": blob_path(&config),
        "RepoTags": [name],
        "Layers": [blob_path(&layer)],
    }]);
    let layout = json!({ "imageLayoutVersion": "1.0.0" });
    let mut json = |path: &str, value: &Value| -> Result<()> {
        archive.file(path, 0o644, &serde_json::to_vec(value)?);
        Ok(())
    };
    json("oci-layout", &layout)?;
    json("index.json", &index)?;
    json("manifest.json", &for_docker)?;
    archive.tar()
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", sha256(bytes))
}

fn blob_path(bytes: &[u8]) -> String {
    format!("blobs/sha256/{}", sha256(bytes))
}
