"""What phreg writes and reads: adapters, whole models, exports, model cards."""
