//! Paged attention in plain StableHLO: the oracle for every other backend
