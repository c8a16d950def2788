//! The pure decisions of `fault`.
#![no_std]
