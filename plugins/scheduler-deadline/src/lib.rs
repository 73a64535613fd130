//! Deadline scheduler: least slack first.
