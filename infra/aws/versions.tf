# What iir_dist needs on AWS: a bucket, a Kubernetes cluster with KubeRay, and roles that may do no more than they must.
# Formatted and read by Terraform 1.11, scanned by checkov; never planned or applied against AWS (no providers, no account here).
terraform {
  required_version = ">= 1.9"
  required_providers {
    aws  = { source = "hashicorp/aws", version = "~> 6.0" }
    helm = { source = "hashicorp/helm", version = "~> 3.0" }
  }
  # State names every resource: keep it in an encrypted bucket of its own, `terraform init -backend-config=...`.
  backend "s3" {}
}

provider "aws" {
  region = var.region
  default_tags { tags = { project = var.name } }
}

provider "helm" {
  kubernetes = {
    host                   = aws_eks_cluster.this.endpoint
    cluster_ca_certificate = base64decode(aws_eks_cluster.this.certificate_authority[0].data)
    exec = {
      api_version = "client.authentication.k8s.io/v1"
      command     = "aws"
      args        = ["eks", "get-token", "--region", var.region, "--cluster-name", var.name]
    }
  }
}
