variable "region" {
  type = string
}

variable "name" {
  type    = string
  default = "iir-dist"
}

variable "bucket" {
  description = "Name of the bucket; it is yours among all of AWS."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets of a network that you have, with a way out to S3, STS, EC2, EKS and your image registry."
  type        = list(string)
  validation {
    condition     = length(var.subnet_ids) >= 2
    error_message = "EKS needs subnets in at least two availability zones."
  }
}

variable "api_access_cidrs" {
  description = "From where the Kubernetes API is reached besides the network itself. Empty: from nowhere."
  type        = list(string)
  default     = []
  validation {
    condition     = !contains(var.api_access_cidrs, "0.0.0.0/0")
    error_message = "Name the networks that you administer from; the whole internet is not one."
  }
}

variable "kubernetes_version" {
  type    = string
  default = "1.34"
}

variable "kuberay_version" {
  description = "What cluster/kuberay is written for."
  type        = string
  default     = "1.7.1"
}

variable "cluster_autoscaler_chart_version" {
  type    = string
  default = "9.50.1"
}

variable "pools" {
  description = <<-TEXT
    Node groups by the label iir-dist/pool that pods ask for. Disk in GB holds images of containers, logs, spilled objects
    and caches. Spot groups name several types of one size: each is another market.
  TEXT
  type = map(object({
    instance_types = list(string)
    spot           = bool
    gpu            = bool
    max            = number
    disk_gb        = number
  }))
  default = {
    head = { instance_types = ["m7i.2xlarge"], spot = false, gpu = false, max = 3, disk_gb = 300 }
    cpu  = { instance_types = ["m7i.4xlarge", "m7a.4xlarge", "m6i.4xlarge"], spot = true, gpu = false, max = 20, disk_gb = 300 }
    gpu  = { instance_types = ["p5.4xlarge"], spot = true, gpu = true, max = 64, disk_gb = 300 }
  }
}
