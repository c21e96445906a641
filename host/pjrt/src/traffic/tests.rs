use super::*;

const VMEM: i64 = 1;

/// `f32 [elements]` in a memory.
fn array(elements: i64, memory_space: i64) -> ShapeProto {
    let mut shape = ShapeProto {
        dimensions: vec![elements],
        layout: Some(Box::new(LayoutProto { memory_space, ..LayoutProto::default() })),
        ..ShapeProto::default()
    };
    shape.set_element_type(PrimitiveType::F32);
    shape
}

fn tuple(parts: &[ShapeProto]) -> ShapeProto {
    let mut shape = ShapeProto { tuple_shapes: parts.to_vec(), ..ShapeProto::default() };
    shape.set_element_type(PrimitiveType::Tuple);
    shape
}

fn op(id: i64, opcode: &str, shape: ShapeProto, operand_ids: &[i64]) -> HloInstructionProto {
    HloInstructionProto {
        id,
        opcode: opcode.to_owned(),
        shape: Some(shape),
        operand_ids: operand_ids.to_vec(),
        ..HloInstructionProto::default()
    }
}

fn parameter(id: i64, number: i64, shape: ShapeProto) -> HloInstructionProto {
    HloInstructionProto { parameter_number: number, ..op(id, "parameter", shape, &[]) }
}

fn calling(instruction: HloInstructionProto, computations: &[i64]) -> HloInstructionProto {
    HloInstructionProto { called_computation_ids: computations.to_vec(), ..instruction }
}

/// The first computation is the entry; the last instruction of each is its root.
fn traffic(computations: &[(i64, Vec<HloInstructionProto>)]) -> Traffic {
    let computation = |(id, instructions): &(i64, Vec<HloInstructionProto>)| HloComputationProto {
        id: *id,
        root_id: instructions.last().unwrap().id,
        instructions: instructions.clone(),
        ..HloComputationProto::default()
    };
    let module = HloModuleProto {
        entry_computation_id: computations[0].0,
        computations: computations.iter().map(computation).collect(),
        ..HloModuleProto::default()
    };
    let plain = Traffic::of_program("hlo", &module.encode_to_vec()).unwrap();
    let with_config = HloModuleProtoWithConfig { hlo_module: Some(module), ..HloModuleProtoWithConfig::default() };
    assert_eq!(Traffic::of_program("hlo_with_config", &with_config.encode_to_vec()).unwrap(), plain);
    plain
}

#[test]
fn what_lies_in_vmem_is_free_and_fetching_it_is_not() {
    let entry = vec![
        parameter(1, 0, array(100, 0)),
        op(2, "copy-start", tuple(&[array(100, VMEM), array(100, 0), array(0, VMEM)]), &[1]),
        op(3, "copy-done", array(100, VMEM), &[2]),
        op(4, "negate", array(100, VMEM), &[3]),
        op(5, "add", array(100, 0), &[4, 3]),
        op(6, "multiply", array(100, 0), &[5, 1]),
    ];
    // Fetched once; one result written; two operands read and one result written.
    assert_eq!(traffic(&[(9, entry)]).bytes, 4 * (100 + 100 + 300));
}

#[test]
fn a_fusion_reads_what_its_body_takes_and_updates_in_place() {
    let entry = vec![
        parameter(1, 0, array(1000, 0)),
        parameter(2, 1, array(1, VMEM)),
        calling(op(3, "fusion", array(10, 0), &[1, 2]), &[20]),
        calling(op(4, "fusion", array(1000, 0), &[1, 3, 2]), &[30]),
    ];
    let slicing = vec![
        parameter(21, 0, array(1000, 0)),
        parameter(22, 1, array(1, 0)),
        op(23, "bitcast", array(1000, 0), &[21]),
        op(24, "dynamic-slice", array(10, 0), &[23, 22]),
    ];
    let updating = vec![
        parameter(31, 0, array(1000, 0)),
        parameter(32, 1, array(10, 0)),
        parameter(33, 2, array(1, 0)),
        op(34, "dynamic-update-slice", array(1000, 0), &[31, 32, 33]),
    ];
    assert_eq!(traffic(&[(9, entry), (20, slicing), (30, updating)]).bytes, 4 * (10 + 10 + 10 + 10));
}

#[test]
fn bodies_count_as_often_as_they_run() {
    let counted = |id: i64| {
        let config = br#"{"known_trip_count":{"n":"7"}}"#.to_vec();
        HloInstructionProto { backend_config: config, ..calling(op(id, "while", array(5, 0), &[1]), &[20]) }
    };
    let entry = vec![
        parameter(1, 0, array(5, 0)),
        counted(2),
        calling(op(3, "while", array(5, 0), &[1]), &[20]),
        calling(op(4, "call", array(5, 0), &[1]), &[20]),
        calling(op(5, "conditional", array(5, 0), &[1]), &[20, 30]),
    ];
    let body = vec![
        parameter(21, 0, array(5, 0)),
        HloInstructionProto { custom_call_target: "kernel".into(), ..op(22, "custom-call", array(5, 0), &[21]) },
        op(23, "all-gather", array(20, 0), &[22]),
    ];
    let found = traffic(&[(9, entry), (20, body), (30, vec![parameter(31, 0, array(5, 0))])]);
    assert_eq!((found.bytes, found.loops_of_unknown_length), (9 * 4 * 25, 1));
    assert_eq!(found.custom_calls, [("kernel".to_owned(), 9)]);
    let gathers: u64 = found.collectives.iter().map(|it| it.times).sum();
    assert!(gathers == 9 && found.collectives.iter().all(|it| it.operation == "all-gather" && it.bytes == 80));
}

#[test]
fn what_is_no_module_is_an_error() {
    assert!(Traffic::of_program("mlir", b"").unwrap_err().to_string().contains("'mlir'"));
    assert!(Traffic::of_program("hlo", b"\xff\xff\xff").unwrap_err().to_string().contains("cannot be read"));
}
