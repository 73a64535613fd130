//! Batcher with a fixed prefill chunk; decodes first.
