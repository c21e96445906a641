//! The 'torus' binary: command line, configuration, wiring
