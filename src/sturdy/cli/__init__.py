"""The command line: what is typed becomes a checked config, a sweep, or one clear line."""
