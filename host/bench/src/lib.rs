//! Load generators and step benches behind 'torus bench'
