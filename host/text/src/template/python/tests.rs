use super::*;

#[test]
fn floats_as_python_writes_them() {
    let cases = [
        (0.0, "0.0"),
        (-1.5, "-1.5"),
        (0.1, "0.1"),
        (100.0, "100.0"),
        (1e-4, "0.0001"),
        (1e-5, "1e-05"),
        (1.25e-7, "1.25e-07"),
        (1e15, "1000000000000000.0"),
        (1e16, "1e+16"),
        (-2.5e300, "-2.5e+300"),
        (f64::INFINITY, "Infinity"),
    ];
    for (number, expected) in cases {
        assert_eq!(float_repr(number), expected);
    }
}

#[test]
fn dates_as_python_writes_them() {
    let at = |unix_s, format| strftime(unix_s, format).unwrap();
    assert_eq!(at(0, "%Y-%m-%d %H:%M:%S"), "1970-01-01 00:00:00");
    assert_eq!(at(951_782_400, "%A, %B %d, %Y"), "Tuesday, February 29, 2000");
    assert_eq!(at(1_735_689_599, "%d %b %Y %j"), "31 Dec 2024 366");
    assert_eq!(at(4_107_542_400, "%F %a"), "2100-03-01 Mon");
    assert_eq!(at(1_700_000_000, "%-d/%-m/%y %I:%M %p %T %e %%"), "14/11/23 10:13 PM 22:13:20 14 %");
    assert!(strftime(0, "%Q").is_err() && strftime(0, "%").is_err());
}
