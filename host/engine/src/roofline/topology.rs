//! Topologies by name, such as `v6e:2x2`: which chips, and how they are connected.

use std::{fmt, str::FromStr};

use super::chip::{CHIPS, Chip};

/// Chips in a grid.
#[derive(Clone, Debug, PartialEq)]
pub struct Topology {
    pub chip: &'static Chip,
    /// Chips along each axis.
    pub dims: Vec<u64>,
}

/// A name that says nothing of a known topology.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{name}' is no topology: {reason}; known are {}", known())]
pub struct UnknownTopology {
    name: String,
    reason: String,
}

fn known() -> String {
    let of = |chip: &Chip| chip.examples.iter().map(|dims| format!("{}:{dims}", chip.name)).collect::<Vec<_>>();
    CHIPS.iter().flat_map(of).collect::<Vec<_>>().join(", ")
}

impl FromStr for Topology {
    type Err = UnknownTopology;

    fn from_str(name: &str) -> Result<Self, UnknownTopology> {
        let unknown = |reason: String| UnknownTopology { name: name.to_owned(), reason };
        let (chip, dims) = name.split_once(':').ok_or_else(|| unknown("it has the form CHIP:AxB".into()))?;
        let found = CHIPS.iter().find(|known| known.name == chip);
        let chip = found.ok_or_else(|| unknown(format!("there is no chip '{chip}'")))?;
        let dims: Option<Vec<u64>> = dims.split('x').map(|dim| dim.parse().ok().filter(|dim| *dim > 0)).collect();
        match dims {
            Some(dims) if dims.len() == chip.axes => Ok(Self { chip, dims }),
            _ => Err(unknown(format!("a {} has {} axes, each of so many chips", chip.name, chip.axes))),
        }
    }
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<_> = self.dims.iter().map(u64::to_string).collect();
        write!(f, "{}:{}", self.chip.name, dims.join("x"))
    }
}

/// The part of a topology over which a model is split: how sums over its devices travel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    pub devices: u64,
    chips: u64,
    /// One way out of a chip towards the others of the group, over all links that lead there.
    bytes_per_s: f64,
    /// Neighbours that data passes on its way to the farthest chip.
    hops: u64,
    link_bytes_per_s: f64,
}

/// From one chip to the next ("How to Scale Your Model", chapter "Sharded Matrices").
const HOP_S: f64 = 1e-6;
/// Between the two devices of a TPU7x chip, in links' bandwidth (Cloud TPU documentation, "TPU7x (Ironwood)").
const ON_CHIP_LINKS: f64 = 6.0;

impl Topology {
    /// PJRT devices.
    pub fn devices(&self) -> u64 {
        self.dims.iter().product::<u64>() * self.chip.devices
    }

    /// HBM of a device that programs may use.
    pub fn memory_bytes(&self) -> u64 {
        /// What libtpu keeps on each device for each device that it may talk to.
        const FOR_EACH_DEVICE: u64 = 512;
        self.chip.memory_bytes - FOR_EACH_DEVICE * self.devices()
    }

    /// So many neighbouring devices, axis by axis; `None` if there are not as many, or they are no box.
    pub fn group(&self, devices: u64) -> Option<Group> {
        let on_chip = devices.min(self.chip.devices);
        let mut left = devices.checked_div(on_chip).filter(|chips| chips * on_chip == devices)?;
        let mut group =
            Group { devices, chips: left, bytes_per_s: 0.0, hops: 0, link_bytes_per_s: self.chip.link_bytes_per_s };
        for dim in &self.dims {
            let taken = if left.is_multiple_of(*dim) { *dim } else { left };
            if !dim.is_multiple_of(taken) {
                return None;
            }
            left /= taken;
            let is_ring = taken == *dim && taken > 2 && dim.is_multiple_of(self.chip.ring);
            let (links, hops) = match taken {
                1 => (0.0, 0),
                _ if is_ring => (2.0, taken / 2),
                _ => (1.0, taken - 1),
            };
            group.bytes_per_s += links * self.chip.link_bytes_per_s;
            group.hops += hops;
        }
        (left == 1).then_some(group)
    }
}

impl Group {
    /// The time of `calls` sums over all devices, of `bytes` on each device in all: a reduce-scatter and an all-gather, over
    /// all links at once.
    pub fn all_reduce_s(&self, calls: u64, bytes: f64) -> f64 {
        let share = |parts: u64| 2.0 * bytes * (parts - 1) as f64 / parts as f64;
        let on_chip = match self.devices / self.chips {
            1 => 0.0,
            devices => share(devices) / (ON_CHIP_LINKS * self.link_bytes_per_s),
        };
        if self.chips == 1 {
            return on_chip;
        }
        // What the devices of a chip have summed among them leaves it once.
        on_chip + share(self.chips) / self.bytes_per_s + calls as f64 * 2.0 * self.hops as f64 * HOP_S
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, devices: u64) -> Option<Group> {
        name.parse::<Topology>().unwrap().group(devices)
    }

    #[test]
    fn names_are_read_and_written() {
        let topology: Topology = "tpu7x:2x2x1".parse().unwrap();
        assert_eq!((topology.devices(), topology.to_string().as_str()), (8, "tpu7x:2x2x1"));
        assert_eq!("v6e:4x4".parse::<Topology>().unwrap().devices(), 16);
    }

    /// What libtpu 0.0.52 said of these.
    #[test]
    fn memory_is_what_the_compiler_says() {
        let memory = |name: &str| name.parse::<Topology>().unwrap().memory_bytes();
        let said = [
            ("v5e:2x4", 16_909_332_480),
            ("v5p:2x4x4", 102_786_646_016),
            ("v6e:2x2", 33_546_041_344),
            ("v6e:16x16", 33_545_912_320),
            ("tpu7x:1x1x1", 101_724_453_888),
            ("tpu7x:4x4x4", 101_724_389_376),
        ];
        for (name, bytes) in said {
            assert_eq!(memory(name), bytes, "{name}");
        }
    }

    #[test]
    fn unknown_names_list_the_known_ones() {
        for name in ["v6e", "v6e:2", "v6e:2x2x1", "v6e:0x1", "v6e:axb", "h100:1x1", ""] {
            let error = name.parse::<Topology>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("'{name}' is no topology")), "{error}");
            assert!(error.contains("v6e:2x2") && error.contains("tpu7x:2x2x1"), "{error}");
        }
    }

    #[test]
    fn a_group_is_a_box_of_neighbours() {
        let devices = |name: &str| -> Vec<u64> { (1..=16).filter(|n| group(name, *n).is_some()).collect() };
        assert_eq!(devices("v6e:2x2"), [1, 2, 4]);
        assert_eq!(devices("v6e:4x4"), [1, 2, 4, 8, 16]);
        assert_eq!(devices("tpu7x:2x2x1"), [1, 2, 4, 8]);
    }

    #[test]
    fn sums_take_the_bytes_over_the_links_and_the_hops() {
        // 2x2 chips: one link along each axis, three quarters of the bytes out and in again, one hop along each axis.
        let time = group("v6e:2x2", 4).unwrap().all_reduce_s(1, 1e9);
        assert!((time - (2.0 * 0.75e9 / 180e9 + 4e-6)).abs() < 1e-9, "{time}");
        // A ring has two ways around: 4 chips of a v5p are one, of a v6e they are a line.
        let ring = group("v5p:4x4x4", 4).unwrap().all_reduce_s(0, 1e9);
        let line = group("v6e:4x4", 4).unwrap().all_reduce_s(0, 1e9);
        assert!((ring * 2.0 - line).abs() < 1e-9);
        // On one chip no hop counts.
        let chip = group("tpu7x:1x1x1", 2).unwrap().all_reduce_s(1, 1e9);
        assert!((chip - 1e9 / 540e9).abs() < 1e-9, "{chip}");
        assert!(group("v6e:1x1", 1).unwrap().all_reduce_s(7, 1e9) == 0.0);
    }
}
