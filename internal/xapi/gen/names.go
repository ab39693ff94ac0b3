package main

import (
	"strings"
	"unicode"
)

// initialisms are the name pieces that Go spells in capitals. A piece that already holds a capital in the
// model (VCPUs, IPv4, SR) is kept as it is.
var initialisms = map[string]string{
	"api": "API", "bios": "BIOS", "ca": "CA", "cbt": "CBT", "cpu": "CPU", "dbx": "DBX", "ha": "HA",
	"hvm": "HVM", "https": "HTTPS", "id": "ID", "igmp": "IGMP", "io": "IO", "ip": "IP", "ips": "IPs",
	"ipv4": "IPv4", "ipv6": "IPv6", "iqn": "IQN", "iscsi": "ISCSI", "iso": "ISO", "lacp": "LACP",
	"ldaps": "LDAPS", "mac": "MAC", "nbd": "NBD", "ntp": "NTP", "numa": "NUMA", "os": "OS", "pbd": "PBD",
	"pci": "PCI", "pgpu": "PGPU", "pif": "PIF", "pv": "PV", "pvh": "PVH", "pvs": "PVS", "qos": "QoS",
	"rbac": "RBAC", "rrd": "RRD", "sdn": "SDN", "sid": "SID", "sm": "SM", "sr": "SR", "sriov": "SRIOV",
	"ssh": "SSH", "ssl": "SSL", "tls": "TLS", "uefi": "UEFI", "url": "URL", "uuid": "UUID", "vbd": "VBD",
	"vdi": "VDI", "vgpu": "VGPU", "vhd": "VHD", "vif": "VIF", "vm": "VM", "vmpp": "VMPP", "vmss": "VMSS",
	"vtpm": "VTPM", "vusb": "VUSB", "wlb": "WLB",
}

// errorInitialisms adds what occurs in error codes only, where everything is in capitals to begin with.
var errorInitialisms = map[string]string{
	"cd": "CD", "cds": "CDs", "cidr": "CIDR", "crl": "CRL", "db": "DB", "dns": "DNS", "eof": "EOF",
	"fcoe": "FCoE", "fips": "FIPS", "gpu": "GPU", "hba": "HBA", "iommu": "IOMMU", "nic": "NIC", "oem": "OEM",
	"ou": "OU", "pbds": "PBDs", "pcpus": "PCPUs", "pgpus": "PGPUs", "pifs": "PIFs", "pusb": "PUSB",
	"pusbs": "PUSBs", "rrds": "RRDs", "rsa": "RSA", "srs": "SRs", "usb": "USB", "vcpu": "VCPU",
	"vcpus": "VCPUs", "vlan": "VLAN", "vlans": "VLANs", "vms": "VMs", "vss": "VSS", "vusbs": "VUSBs",
	"xenapi": "XenAPI", "xha": "XHA", "xml": "XML", "xmlrpc": "XMLRPC",
}

// goName returns the exported Go name of a class, field, enum or enum value: pieces between "_" and "-" begin
// with a capital, initialisms are in capitals.
func goName(s string) string {
	var b strings.Builder
	for piece := range strings.FieldsFuncSeq(s, separator) {
		if up, ok := initialisms[piece]; ok {
			piece = up
		}
		b.WriteString(capital(piece))
	}
	return b.String()
}

// errorName returns the Go name of an error code: VDI_IN_USE is ErrVDIInUse.
func errorName(code string) string {
	var b strings.Builder
	b.WriteString("Err")
	for piece := range strings.FieldsFuncSeq(strings.ToLower(code), separator) {
		if up, ok := initialisms[piece]; ok {
			piece = up
		} else if up, ok := errorInitialisms[piece]; ok {
			piece = up
		}
		b.WriteString(capital(piece))
	}
	return b.String()
}

func separator(r rune) bool { return r == '_' || r == '-' }

func capital(s string) string {
	r := []rune(s)
	r[0] = unicode.ToUpper(r[0])
	return string(r)
}
