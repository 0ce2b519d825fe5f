variable "project" {
  type = string
}

variable "region" {
  type = string
}

variable "zone" {
  description = "A zone of the region that has the GPUs."
  type        = string
}

variable "name" {
  type    = string
  default = "iir-dist"
}

variable "bucket" {
  description = "Name of the bucket; it is yours among all of Google Cloud."
  type        = string
}

variable "network" {
  type = string
}

variable "subnetwork" {
  description = "With private Google access and a NAT for the image registry, if that is elsewhere."
  type        = string
}

variable "control_plane_cidr" {
  type    = string
  default = "172.16.0.32/28"
}

variable "api_access_cidrs" {
  description = "From where the Kubernetes API is reached besides the network itself. Empty: from nowhere."
  type        = list(string)
  default     = []
}

variable "kuberay_version" {
  description = "What cluster/kuberay is written for."
  type        = string
  default     = "1.7.1"
}

variable "pools" {
  description = "Node pools by the label iir-dist/pool that pods ask for; gpu is the accelerator of the machine type, or null."
  type = map(object({
    machine_type = string
    spot         = bool
    gpu          = string
    max          = number
    disk_gb      = number
  }))
  default = {
    head = { machine_type = "n2-standard-8", spot = false, gpu = null, max = 3, disk_gb = 300 }
    cpu  = { machine_type = "n2-standard-16", spot = true, gpu = null, max = 20, disk_gb = 300 }
    gpu  = { machine_type = "a3-highgpu-1g", spot = true, gpu = "nvidia-h100-80gb", max = 64, disk_gb = 300 }
  }
}
