use fault_user::kernel::injector::*;
fn main() {
    let words: u32 = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(1);
    let mut i = Injector::load(&Options { capacity: Capacity { rules: 64*words, classes: 64, hosts: 1, scopes: 1 }, events: true, attachment: None }).unwrap();
    for side in [Side::Egress, Side::Ingress] {
        let t = std::time::Instant::now();
        match i.program(side, true) {
            Ok(p) => { let info = p.info().unwrap(); println!("{side:?} ok {:?} {:?}", info.verified_instruction_count(), t.elapsed()); }
            Err(e) => { println!("{e}"); std::fs::write("/tmp/verifier.log", format!("{e:?}")).unwrap(); }
        }
    }
}
