//! Fair-share scheduler: weighted fair service among tenants.
