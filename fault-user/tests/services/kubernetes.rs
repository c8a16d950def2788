//! The manifests in `docs/kubernetes`, against the schemas that Kubernetes publishes (in the Python package
//! kubernetes-validate, so that no cluster is needed).

use std::path::Path;
use std::process::Command;

const MANIFESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/kubernetes");
/// The newest and the oldest Kubernetes that they are for.
const VERSIONS: [&str; 2] = ["1.37", "1.25"];

/// Runs the validator on files.
fn validate(tool: &Path, version: &str, files: &[&Path]) -> (bool, String) {
    let output = Command::new("python3")
        .args([
            "-c",
            "import sys; from kubernetes_validate.__main__ import main; sys.exit(main())",
        ])
        .args(["--strict", "--kubernetes-version", version])
        .args(files)
        .env("PYTHONPATH", tool)
        .output()
        .expect("python3");
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn the_manifests_are_valid() {
    for program in ["python3", "pip"] {
        if Command::new(program).arg("--version").output().is_err() {
            eprintln!("skipped: {program} is not installed");
            return;
        }
    }
    let tool = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients/kubernetes");
    if !tool.join("kubernetes_validate").exists() {
        let installed = Command::new("pip")
            .args(["install", "--quiet", "--target"])
            .arg(&tool)
            .arg("kubernetes-validate==1.37.0")
            .status();
        assert!(installed.expect("pip").success());
    }
    let [sidecar, daemonset] =
        ["sidecar", "daemonset"].map(|name| Path::new(MANIFESTS).join(format!("{name}.yaml")));
    for version in VERSIONS {
        let (valid, message) = validate(&tool, version, &[&sidecar, &daemonset]);
        assert!(valid, "Kubernetes {version}: {message}");
    }
    // It can tell.
    let folder = tempfile::tempdir().expect("a folder");
    let wrong = folder.path().join("wrong.yaml");
    let manifest = std::fs::read_to_string(&daemonset).expect("read");
    std::fs::write(&wrong, manifest.replace("hostPID", "hostPid")).expect("written");
    assert!(!validate(&tool, VERSIONS[0], &[&wrong]).0);
}
