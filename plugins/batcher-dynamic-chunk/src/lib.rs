//! Batcher that sizes chunks to a step-time target.
