//! Find, check and load plugins; link their fragments
