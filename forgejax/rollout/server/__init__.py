"""The engine for other processes: token ids in and out over HTTP, and JetStream's gRPC service."""
