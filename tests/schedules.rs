//! `torus bench kernels --topology`: schedules of the TPU's kernels, from the command line.

use std::process::Command;

use serde_json::Value;

use crate::server::torus;

fn bench(arguments: &[&str]) -> std::process::Output {
    Command::new(torus()).args(["bench", "kernels"]).args(arguments).output().unwrap()
}

#[test]
fn a_kernel_is_costed_without_a_tpu() {
    let output = bench(&["--topology", "v6e:1x1", "--case", "decode 8/2x128", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let cases = found["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    let number = |case: &Value, name: &str| case[name].as_f64().unwrap_or_else(|| panic!("{name} of {case}"));
    for case in cases {
        // The loop is a part of the path, and no modelled kernel is faster than memory.
        assert!(number(case, "loop_cycles") < number(case, "path_cycles"), "{case}");
        assert!(number(case, "modelled_of_floor") >= 1.0, "{case}");
        assert!(number(case, "kv_bytes") < number(case, "bytes_in"), "{case}");
        // An iteration takes 4 pages of 128 tokens.
        let contexts = [512.0, 1024.0, 4096.0, 32_768.0];
        let tokens = contexts.iter().find(|tokens| case["case"].as_str().unwrap().ends_with(&format!(" kv {tokens}")));
        let groups = 64.0 * tokens.unwrap() / 512.0;
        assert_eq!(number(case, "loop_cycles"), groups * number(&case["inner_loop"], "cycles"), "{case}");
        let share = number(&case["inner_loop"]["slot_use"], case["inner_loop"]["busiest"].as_str().unwrap());
        assert!(share > 0.0 && share <= 1.0, "{case}");
    }
    // The loop waits for the pages, and little is added to what they take.
    for (case, limit) in cases.iter().zip([1.12, 1.06, 1.02, 1.01]) {
        assert!(number(case, "loop_of_floor") <= 0.85 && number(case, "modelled_of_floor") <= limit, "{case}");
    }
    // Twice the tokens are about twice the groups of pages, and the loop is all that grows.
    let ratio = number(&cases[1], "loop_cycles") / number(&cases[0], "loop_cycles");
    assert!((1.9..2.1).contains(&ratio), "{ratio}");
    let rest = |case: &Value| number(case, "path_cycles") - number(case, "loop_cycles");
    assert_eq!(rest(&cases[0]), rest(&cases[3]));
}

#[test]
fn what_cannot_be_costed_is_an_error() {
    let message = |arguments: &[&str]| {
        let output = bench(arguments);
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(message(&["--topology", "v4:2x2x1"]).contains("v4:2x2x1"));
    assert!(message(&["--topology", "v6e:1x1", "--case", "no such"]).contains("decode 8/2x128"));
}
