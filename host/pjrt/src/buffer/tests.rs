use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
    mpsc,
};

use super::*;
use crate::{
    AlignedBytes,
    testing::{cpu_client, cpu_plugin, cpu_plugins, f32_buffer, f32_bytes, read_f32},
};

#[test]
fn contents_come_back_as_they_went() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        let device = &client.devices().unwrap()[0];
        let bytes: Vec<u8> = (0..60).collect();
        let buffer = client.buffer_from_host(&bytes, ElementType::BF16, &[2, 3, 5], device).unwrap();
        assert_eq!(buffer.element_type().unwrap(), ElementType::BF16);
        assert_eq!(buffer.dims().unwrap(), [2, 3, 5]);
        assert_eq!(buffer.host_bytes().unwrap(), 60);
        assert!(buffer.device_bytes().unwrap() >= 60);
        buffer.ready_event().unwrap().wait().unwrap();
        assert_eq!(buffer.to_host_vec().unwrap(), bytes);
        let mut destination = vec![0; 60];
        buffer.to_host_slice(&mut destination).unwrap();
        assert_eq!(destination, bytes);
        assert!(buffer.to_host_slice(&mut [0; 59]).is_err());

        let reused = buffer.to_host_reusing(destination).unwrap().wait().unwrap();
        assert_eq!(reused, bytes);

        let scalar = client.buffer_from_host(&7_i32.to_le_bytes(), ElementType::S32, &[], device).unwrap();
        assert_eq!(scalar.dims().unwrap(), [0_i64; 0]);
        assert_eq!(scalar.to_host_vec().unwrap(), 7_i32.to_le_bytes());

        let empty = client.buffer_from_host(&[], ElementType::F32, &[0, 8], device).unwrap();
        assert_eq!(empty.to_host_vec().unwrap(), [0_u8; 0]);
    }
}

#[test]
fn shapes_that_do_not_fit_the_data_are_refused() {
    let client = cpu_client(&cpu_plugin(), 1);
    let error = client.buffer_from_host(&[0; 15], ElementType::F32, &[4], &client.devices().unwrap()[0]).unwrap_err();
    assert!(error.to_string().contains("F32[4] takes 16 bytes, not 15"), "{error}");
}

#[test]
fn devices_of_other_clients_are_refused() {
    let (one, other) = (cpu_client(&cpu_plugin(), 1), cpu_client(&cpu_plugin(), 1));
    let error = one.buffer_from_host(&[0], ElementType::U8, &[], &other.devices().unwrap()[0]).unwrap_err();
    assert!(error.to_string().contains("another client"), "{error}");
}

#[test]
fn deleted_buffers_yield_nothing() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        let buffer = f32_buffer(&client, &[1.0]);
        assert!(!buffer.is_deleted().unwrap());
        buffer.delete().unwrap();
        assert!(buffer.is_deleted().unwrap());
        assert!(buffer.to_host_vec().is_err());
        assert_eq!(format!("{buffer:?}"), "Buffer(deleted)");
    }
}

/// Tells when it is dropped.
struct Watched {
    bytes: AlignedBytes,
    dropped: Arc<AtomicBool>,
    told: mpsc::Sender<()>,
}

impl AsRef<[u8]> for Watched {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::SeqCst);
        self.told.send(()).ok();
    }
}

#[test]
fn owned_memory_is_used_in_place_and_freed_after_the_buffer() {
    for plugin in cpu_plugins() {
        let client = cpu_client(&plugin, 1);
        let bytes = AlignedBytes::copy_of(&f32_bytes(&[1.0, 2.0, 3.0, 4.0])).unwrap();
        let address = bytes.as_ptr() as usize;
        let dropped = Arc::new(AtomicBool::new(false));
        let (told, when) = mpsc::channel();
        let owner = Watched { bytes, dropped: Arc::clone(&dropped), told };
        let buffer = client.buffer_from_owned(owner, ElementType::F32, &[4], &client.devices().unwrap()[0]).unwrap();
        assert_eq!(buffer.address().unwrap(), address, "{plugin:?}");
        assert_eq!(read_f32(&buffer), [1.0, 2.0, 3.0, 4.0]);
        assert!(!dropped.load(Ordering::SeqCst));
        drop(buffer);
        when.recv_timeout(std::time::Duration::from_secs(10)).expect("freed once the buffer is gone");
    }
}

#[test]
fn owned_memory_that_is_not_aligned_is_copied() {
    let client = cpu_client(&cpu_plugin(), 1);
    let mut bytes = AlignedBytes::zeroed(64 + 4).unwrap();
    bytes[4..8].copy_from_slice(&2.5_f32.to_le_bytes());
    struct Tail(AlignedBytes);
    impl AsRef<[u8]> for Tail {
        fn as_ref(&self) -> &[u8] {
            &self.0[4..]
        }
    }
    let buffer = client.buffer_from_owned(Tail(bytes), ElementType::F32, &[16], &client.devices().unwrap()[0]).unwrap();
    assert_eq!(read_f32(&buffer)[0], 2.5);
}

#[test]
fn refused_owners_are_dropped() {
    let client = cpu_client(&cpu_plugin(), 1);
    let (told, when) = mpsc::channel();
    let owner = Watched { bytes: AlignedBytes::zeroed(8).unwrap(), dropped: Arc::default(), told };
    assert!(client.buffer_from_owned(owner, ElementType::F32, &[4], &client.devices().unwrap()[0]).is_err());
    when.try_recv().expect("dropped before the error was returned");
}

#[test]
fn copies_can_be_abandoned() {
    let client = cpu_client(&cpu_plugin(), 1);
    let buffer = f32_buffer(&client, &vec![1.0; 1 << 20]);
    for _ in 0..20 {
        drop(buffer.to_host().unwrap());
    }
    assert_eq!(read_f32(&buffer).len(), 1 << 20);
}

#[test]
fn buffers_outlive_the_clients_handle() {
    let buffer = {
        let client = cpu_client(&cpu_plugin(), 1);
        f32_buffer(&client, &[3.0])
    };
    assert_eq!(read_f32(&buffer), [3.0]);
}
