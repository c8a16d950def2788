//! The reader of DNS queries over TCP: whatever the bytes, and however they are cut, the same is answered.
#![no_main]

use std::sync::LazyLock;

use fault_user::plan::Plan;
use fault_user::relay::{Queries, fuzz_queries};
use fault_user::rule::{ResolvedRule, Rule, SystemResolver, Targets};
use libfuzzer_sys::fuzz_target;

static RULES: LazyLock<[(Rule, ResolvedRule); 1]> = LazyLock::new(|| {
    let rule: Rule = "dns:*.a mix 50%:nxdomain 25%:answer=10.0.0.9 p=75%"
        .parse()
        .expect("a rule");
    let resolved = rule.resolve(&Targets::new(), &mut SystemResolver);
    [(rule, resolved.expect("it has no host"))]
});

fuzz_target!(|data: &[u8]| fuzz_queries(queries, data));

/// What a rule does that has done nothing yet.
fn queries() -> Queries {
    let plan = Plan::new(&*RULES, 1, None, None).expect("a plan");
    plan.rules[0].queries().expect("it answers").clone()
}
