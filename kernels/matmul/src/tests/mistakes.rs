//! What has no kernel is refused with a remedy.

use torus_mosaic::{Elem, Generation};

use crate::{Activations, Format, Matmul, MatmulError, PageCopy, Tiles, Weights};

fn error(product: Matmul) -> String {
    product.tiles(Generation::V6e).unwrap_err().to_string()
}

#[test]
fn shapes_are_refused_by_name() {
    let weights = Weights::new(256, 256, Format::Int8);
    let plain = |weights: Weights| error(Matmul::new(16, weights));
    assert_eq!(error(Matmul::new(0, weights)), "rows is 0: there is nothing to multiply");
    assert_eq!(
        plain(Weights { inputs: 200, ..weights }),
        "inputs is 200: pad weights and rows with zeros to a multiple of 128"
    );
    assert_eq!(
        plain(Weights { outputs: 130, ..weights }),
        "outputs is 130: pad weights to a multiple of 128, better of 256"
    );
    assert!(plain(Weights { experts: Some(0), ..weights }).contains("leave `experts` out"));
    for group in [0, 48, 512] {
        assert!(plain(Weights { group: Some(group), ..weights }).starts_with(&format!("group is {group}: ")));
    }
    let floats = Weights { format: Format::Bf16, group: Some(64), ..weights };
    assert!(plain(floats).contains("weights in bf16 have no scales"));
    let floats = Weights { format: Format::Float8, ..weights };
    let bytes = Matmul { activations: Activations::Int8, ..Matmul::new(16, floats) };
    assert!(error(bytes).contains("integer weights"));
}

#[test]
fn tiles_are_refused_by_name() {
    let product = Matmul::new(64, Weights::new(256, 512, Format::Int8));
    let good = Tiles { rows: 16, columns: 256, strip: 128, ring: 2, blocks: 2 };
    assert!(product.kernel(&good).is_ok());
    let refused = |tiles: Tiles, field: &str| {
        let message = product.kernel(&tiles).map(|_| ()).unwrap_err().to_string();
        assert!(message.starts_with(field), "{message}");
    };
    refused(Tiles { rows: 24, ..good }, "tiles.rows is 24");
    refused(Tiles { columns: 384, ..good }, "tiles.columns is 384");
    refused(Tiles { strip: 192, ..good }, "tiles.strip is 192");
    refused(Tiles { ring: 1, ..good }, "tiles.ring is 1");
    refused(Tiles { blocks: 1, ..good }, "tiles.blocks is 1");
    refused(Tiles { blocks: 3, ..good }, "tiles.blocks is 3");
}

#[test]
fn generations_have_limits() {
    let bytes = Matmul { activations: Activations::Int8, ..Matmul::new(16, Weights::new(256, 256, Format::Int8)) };
    assert!(bytes.tiles(Generation::V6e).is_ok());
    let message = bytes.tiles(Generation::Tpu7x).unwrap_err().to_string();
    assert!(message.contains("products of bytes on Tpu7x") && message.contains("Activations::Bf16"), "{message}");

    // Tiles that one generation has room for and the other has not.
    let product = Matmul::new(256, Weights::new(16384, 4096, Format::Bf16));
    let tiles = Tiles { rows: 256, columns: 512, strip: 256, ring: 4, blocks: 1 };
    let kernel = product.kernel(&tiles).unwrap();
    let options = product.call_options(&kernel, &tiles, Generation::V6e).unwrap();
    assert!(options.vmem_limit_bytes.unwrap() > Generation::Tpu7x.usable_vmem_bytes());
    let refused = product.call_options(&kernel, &tiles, Generation::Tpu7x).unwrap_err();
    assert!(matches!(refused, MatmulError::Vmem { available: 67_043_328, .. }), "{refused}");
    // The rule finds others.
    let smaller = product.tiles(Generation::Tpu7x).unwrap();
    assert!(product.call_options(&product.kernel(&smaller).unwrap(), &smaller, Generation::Tpu7x).is_ok());

    // A tile of all inputs is too much for any.
    let message = error(Matmul::new(16, Weights::new(1 << 19, 256, Format::Bf16)));
    assert!(message.contains("split the inputs over devices"), "{message}");
}

#[test]
fn page_copies_are_refused_by_name() {
    let pool = Elem::Bf16.of([8, 16, 128]);
    let error = |copy: PageCopy| copy.kernel().map(|_| ()).unwrap_err().to_string();
    assert!(error(PageCopy::within(Elem::Bf16.of([8, 128]), 4)).starts_with("from.dims is 2"));
    assert!(error(PageCopy::within(pool.clone(), 0)).starts_with("most is 0"));
    assert!(error(PageCopy { in_flight: 0, ..PageCopy::within(pool, 4) }).starts_with("in_flight is 0"));
}
