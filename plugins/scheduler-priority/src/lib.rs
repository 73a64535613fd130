//! Priority scheduler with ageing.
