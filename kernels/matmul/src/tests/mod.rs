mod compile;
mod copies;
mod graph;
mod mistakes;
mod plain;
mod reference;
mod shapes;
mod tiles;
