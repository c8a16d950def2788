//! Changes that outlive the process. They are recorded before they are made, and undone at the end, by the next
//! instance or by `fault clean`.

pub mod change;
pub mod instance;
pub mod journal;
pub mod leftover;
pub mod leftovers;
