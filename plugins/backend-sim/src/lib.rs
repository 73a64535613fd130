//! Backend that executes nothing and tells how long steps would take.
