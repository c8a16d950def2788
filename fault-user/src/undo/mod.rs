//! What outlives the process: noted before it is changed, undone at the end, by the next instance or by `fault clean`.

pub mod change;
pub mod instance;
pub mod journal;
pub mod leftover;
pub mod leftovers;
