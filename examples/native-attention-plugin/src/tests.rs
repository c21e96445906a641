use torus_plugin::testkit::attention;

use crate::NativeLoop;

#[test]
fn it_conforms() {
    attention::check::<NativeLoop>().assert();
}
