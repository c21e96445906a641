//! StableHLO graph builder with named axes
