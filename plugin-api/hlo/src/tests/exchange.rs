//! Collectives over four CPU devices.

use super::device::{DEVICES, Tensor, run_on_all};
use crate::{Group, axes::*};

/// Device `d` holds `[10 d, 10 d + 1, …]`.
fn shards() -> Vec<Vec<Tensor>> {
    let shard = |device: usize| {
        let values: Vec<f32> = (0..8).map(|i| (10 * device + i) as f32).collect();
        vec![Tensor::new(&[(TOKENS, 2), (HIDDEN, 4)], &values)]
    };
    (0..DEVICES).map(shard).collect()
}

#[test]
fn devices_sum_gather_and_scatter() {
    let shards = shards();
    let lists: Vec<_> = shards.iter().map(Vec::as_slice).collect();
    let group = |channel| Group::all(DEVICES as u32, channel);
    let out = run_on_all(&lists, |_, x| {
        vec![
            x[0].all_reduce_sum(&group(1)),
            x[0].all_reduce_max(&group(2)),
            x[0].all_gather(HIDDEN, &group(3)),
            x[0].reduce_scatter_sum(HIDDEN, &group(4)),
        ]
    });
    for (device, out) in out.iter().enumerate() {
        let sums: Vec<f32> = (0..8).map(|i| (60 + 4 * i) as f32).collect();
        assert_eq!(out[0].values::<f32>(), sums);
        assert_eq!(out[1].values::<f32>(), (30..38).map(|i| i as f32).collect::<Vec<_>>());
        let gathered = |i: usize| (i % 16 / 4 * 10 + i / 16 * 4 + i % 4) as f32;
        assert_eq!(out[2].values::<f32>(), (0..32).map(gathered).collect::<Vec<_>>());
        assert_eq!(out[3].values::<f32>(), [sums[device], sums[4 + device]]);
    }
}

#[test]
fn groups_keep_to_themselves() {
    let shards = shards();
    let lists: Vec<_> = shards.iter().map(Vec::as_slice).collect();
    let group = Group { devices: vec![vec![0, 2], vec![1, 3]], channel: 1 };
    let out = run_on_all(&lists, |_, x| vec![x[0].all_reduce_sum(&group)]);
    let first: Vec<_> = out.iter().map(|out| out[0].values::<f32>()[0]).collect();
    assert_eq!(first, [20.0, 40.0, 20.0, 40.0]);
}
