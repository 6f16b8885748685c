//! A USB port, or a USB device, belongs to a virtual machine.
